# make demo   from nothing to a model that answers, in minutes, on any machine; make zero ARGS='--budget 2h': in more
# make test   the test suite, in minutes; make test-all: with the heavy tests too, as CI does
# make test-processors   the numeric tests as other processors would run them; ONLY='with_avx2 or threads_3'
# make lint: ruff and mypy; make venv: the environment alone
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
# a process for each core; whole files, since tests of a file share what is made once. Timing is bench/regression's;
# schemathesis is used as a library, and its plugin costs each process seconds.
PYTEST := $(RUN) -m pytest -n auto --maxprocesses 8 --dist loadfile -p no:benchmark -p no:schemathesis

.PHONY: demo zero test test-heavy test-all test-processors lint venv clean

venv: $(VENV)/installed

$(VENV)/installed: setup.py constraints.txt CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# both go on where they were interrupted; `minimind zero --help` has the flags for ARGS
demo: venv
	$(RUN) -m minimind demo

zero: venv
	$(RUN) -m minimind zero $(ARGS)

test: venv
	$(PYTEST) tests/

test-heavy: venv
	MINIMIND_TEST_PICTURES=1 $(PYTEST) -m 'heavy and not slow' tests/

test-all: test test-heavy

test-processors: venv
	$(RUN) -m pytest -s -m slow tests/test_processors.py $(if $(ONLY),-k '$(ONLY)')

lint: venv
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy minimind kernels train bench

clean:
	rm -rf $(VENV) build dist *.egg-info
