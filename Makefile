# make demo   from nothing to a model that answers, in minutes, on any machine
# make test   the test suite, in minutes; make test-all: with the heavy tests too, as CI does
# make test-processors   the numeric tests as other processors would run them; ONLY='with_avx2 or threads_3'
# make lint: ruff and mypy; make venv: the environment alone
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
# a process for each core; whole files, since tests of a file share what is made once. Timing is bench/regression's.
PYTEST := $(RUN) -m pytest -n auto --maxprocesses 8 --dist loadfile -p no:benchmark

.PHONY: demo test test-heavy test-all test-processors lint venv clean

venv: $(VENV)/installed

$(VENV)/installed: setup.py constraints.txt CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: runs/demo-sft/finished
	@echo 'talk to it: $(VENV)/bin/minimind chat; rm -r runs/demo-* and it is trained anew'

# an interrupted run goes on where it was; a finished one is not repeated
runs/demo-pretrain/finished: | venv
	$(RUN) train/pretrain.py --tokens 700_000 --evals 4 --out runs/demo-pretrain

runs/demo-sft/finished: runs/demo-pretrain/finished
	$(RUN) train/sft.py --from runs/demo-pretrain --evals 4 --out runs/demo-sft

test: venv
	$(PYTEST) tests/

test-heavy: venv
	$(PYTEST) -m 'heavy and not slow' tests/

test-all: test test-heavy

test-processors: venv
	$(RUN) -m pytest -s -m slow tests/test_processors.py $(if $(ONLY),-k '$(ONLY)')

lint: venv
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy minimind kernels train bench

clean:
	rm -rf $(VENV) build dist *.egg-info
