"""bench/card.py: tasks are stopped in time, the archive survives, a second call continues; every command exists."""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import tyro
from rich.console import Console

from bench import card, card_pack
from bench.card import Args, CardRun
from bench.cards import imports as card_imports
from bench.cards import report as card_report
from bench.cards.tasks import GPU_MODULES, NOT_ON_A_GPU, SANITIZERS, BenchmarkTask, CardSetting, tasks  # fmt: skip

ROOT = Path(__file__).parents[1]


@pytest.fixture
def here(tmp_path) -> CardRun:
    return CardRun(tmp_path / "work", tmp_path / "card.tar.gz", "abc", Console(quiet=True), {}, dict(os.environ))


def python(name: str, code: str, **fields) -> BenchmarkTask:
    return BenchmarkTask(name, (sys.executable, "-S", "-c", code), **{"part": 1, **fields})


def archived(path: Path) -> dict[str, str]:
    with tarfile.open(path) as tar:
        return {e.name: tar.extractfile(e).read().decode(errors="replace") for e in tar if e.isfile()}


def states(state: dict) -> dict[str, str]:
    return {name: entry["state"] for name, entry in state.items()}


FOUR = (
    python("good one", "print('all is [well]')"),
    python("bad one", "print('what went wrong'); raise SystemExit(3)"),
    BenchmarkTask("other", ("x",), needs="no-such-program", part=2),
    python("with a GPU", "raise SystemExit(1)", gpu=True, part=2),
)


def test_each_task_has_a_state_and_a_line(here, capsys):
    here.console, here.rehearse = Console(width=120), True
    assert card.run_selected(here, FOUR, Args()) == 1
    files = archived(here.archive)
    assert states(json.loads(files["card.json"])) == {
        "good one": "done",
        "bad one": "failed 3",
        "other": "no no-such-program",
        "with a GPU": "needs a GPU",
    }
    assert files["logs/bad-one.log"] == "what went wrong\n"
    assert not card.read_state(here.work / "card.json", rehearse=False), "a rehearsal is no result of a GPU"
    table = files["card.md"].splitlines()
    assert table[2].startswith("| good one | done | 0 | all is [well] |") and "what went wrong" in table[3]
    shown = capsys.readouterr().out
    assert "all is [well]" in shown and "3 of 4 tasks to run" in shown and str(here.archive) in shown


def test_a_second_call_runs_the_tasks_that_are_not_done(here, tmp_path):
    here.begin(FOUR)
    assert [task.name for task in here.order(FOUR, again=False)] == [task.name for task in FOUR]
    for task in FOUR[:2]:
        here.run(task)
    card_report.unpack(here.archive, tmp_path / "elsewhere")
    here.work = tmp_path / "elsewhere"
    here.state = card.read_state(here.work / "card.json", rehearse=False)
    assert states(here.state)["good one"] == "done"
    names = [task.name for task in here.order(FOUR, again=False)]
    assert names == ["other", "with a GPU", "bad one"], "what failed at this commit comes last"
    assert here.order(FOUR, again=True)[-2:] == list(FOUR[:2])
    here.commit = "def"
    assert [task.name for task in here.order(FOUR, again=False)] == ["bad one", "other", "with a GPU"]


def test_no_task_starts_that_does_not_fit(here):
    here.deadline = time.monotonic() + card.PACKING + 30
    selected = [python("long one", "", minutes=1.0), python("short one", "", minutes=0.1)]
    here.begin(selected)
    here.run_all(selected)
    assert states(here.state) == {"long one": "not reached", "short one": "done"}


@pytest.mark.parametrize("by", ["estimate", "deadline"])
def test_a_task_is_stopped_after_twice_its_estimate_and_at_the_deadline(here, by):
    minutes = 0.002 if by == "estimate" else 1.0
    if by == "deadline":
        here.deadline = time.monotonic() + card.PACKING + 0.25
    start = time.monotonic()
    here.run(python("slow", "import time; time.sleep(60)", minutes=minutes))
    assert time.monotonic() - start < 10
    assert states(here.state) == states(json.loads(archived(here.archive)["card.json"])) == {"slow": "cut"}


def test_the_archive_exists_while_a_task_runs(here):
    """The machine may be taken away, when no code of ours can run."""
    here.every = 0.1
    code = "print('half of it', flush=True)\nimport time; time.sleep(0.5)\nprint('the rest')"
    seen = []
    original = here.save

    def save():
        result = original()
        seen.append(archived(here.archive))
        return result

    here.save = save
    here.run(python("slow", code, minutes=1))
    during = [files for files in seen if files.get("logs/slow.log") == "half of it\n"]
    assert during and states(json.loads(during[0]["card.json"])) == {"slow": "cut"}
    assert states(here.state) == {"slow": "done"} and here.state["slow"]["said"] == "the rest"


def test_files_that_are_too_large_are_left_out_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(card_report, "LARGEST", 10)
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "small").write_text("1234567890")
    (tmp_path / "a" / "large").write_text("1234567890 and more")
    assert card_report.pack(tmp_path / "a", tmp_path / "it.tar.gz") == ["large"]
    assert archived(tmp_path / "it.tar.gz") == {"b/small": "1234567890"}


def test_the_result_of_a_task(tmp_path):
    log = tmp_path / "log"
    assert card_report.result_line(log) == ""
    rows = [
        {"peer": "ours", "positions_per_second": 1234.5},
        {"peer": "naive", "tokens_per_second": 10.0, "status": "ok"},
        {"peer": "hf", "status": "failed", "reason": "no"},
    ]
    log.write_text(f"sft, nano: without liger: needs a GPU\n{json.dumps({'rows': rows})}\nafter\n")
    assert card_report.result_line(log) == "ours 1,234/s; naive 10/s; hf failed; without liger"
    times = [
        {"op": "rope", "contender": name, "phase": phase, "ratio": 1.5, "status": "ok"}
        for name in ("minimind", "liger")
        for phase in ("forward", "both")
    ]
    log.write_text(json.dumps({"rows": times}))
    assert card_report.result_line(log) == "rope liger 1.50x"
    decoding = {"op": "decode_attention", "contender": "eager", "phase": "forward", "ratio": 2.0, "status": "ok"}
    log.write_text(json.dumps({"rows": [decoding]}))
    assert card_report.result_line(log) == "decode_attention eager 2.00x", "it has no other pass"
    log.write_text(json.dumps({"rows": [{"stage": "sft", "tokens_per_second": 7.0}]}))
    assert card_report.result_line(log) == "sft 7/s"
    log.write_text(json.dumps({"model": "nano", "tokens_per_second": 8.0, "lost": 0}))
    assert card_report.result_line(log) == "nano 8/s", "one row by itself, as bench/serving.py prints it"
    log.write_text("step 1 loss 9\nstep 2 loss 8\nheld-out 7\nfinished\n")
    assert card_report.result_line(log, ("step", "held-out", "never")) == "step 2 loss 8; held-out 7"
    assert card_report.result_line(log, ("never",)) == "finished"


def test_a_task_that_is_stopped_ends_with_all_that_it_started(here, tmp_path):
    here.deadline = time.monotonic() + card.PACKING + 2.0
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    here.run(python("slow", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])", minutes=1.0))
    assert states(here.state) == {"slow": "cut"}
    with pytest.raises(ProcessLookupError):
        pid = int((tmp_path / "pid").read_text())
        for _ in range(50):  # until its new parent has read its exit status
            os.kill(pid, 0)
            time.sleep(0.1)


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("rehearse", [False, True])
def test_every_command_parses(rehearse, everything, tmp_path):
    """With the dataclass of its own script, so that a renamed flag does not fail on a rented GPU."""
    every = tasks(CardSetting(rehearse, tmp_path, ("a.jsonl",), ("b.jsonl",)), everything)
    parts = [task.part for task in every]
    assert parts == sorted(parts) and set(parts) == set(range(1, 19 if everything else 12))
    assert every[0].name == "imports" and len({task.name for task in every}) == len(every)
    assert set(GPU_MODULES).isdisjoint(every[0].command) == rehearse
    for task in every:
        assert 0 < task.minutes <= (5 if everything else 2), "it may take twice as long"
        script = next((part for part in task.command if part.endswith(".py")), "")
        if script.startswith(("bench/", "train/")) and task.name != "imports":
            module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
            args = tyro.cli(module.Args, args=list(task.command[task.command.index(script) + 1 :]))
            assert getattr(args, "out", None) is None or args.out.startswith(str(tmp_path))


def test_all_tasks_test_every_kernel_under_every_sanitizer(tmp_path):
    every = tasks(CardSetting(False, tmp_path), everything=True)
    files = {part for task in every for part in task.command}
    tests = {f"tests/kernels/{f.name}" for f in (ROOT / "tests/kernels").glob("test_*.py")}
    left_out = {f"tests/kernels/test_{name}.py" for name in NOT_ON_A_GPU}
    assert tests - files == left_out, "a new file runs on a GPU unless it is listed"
    for tool in SANITIZERS:
        checks = [task for task in every if task.name.startswith(tool)]
        scripts = {part for task in checks for part in task.command if part.startswith("bench/")}
        assert scripts == {"bench/native_check.py", "bench/kernel_check.py"}
        assert all(task.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1" for task in checks)
    stages = {task.name for task in every if task.name.startswith("throughput of")}
    assert stages == {f"throughput of {stage}" for stage in ("sft", "lora", "distill", "reason", "dpo")}


def test_a_small_gpu_gets_small_batches(tmp_path):
    every = tasks(CardSetting(False, tmp_path, large=False), everything=True)
    dpo = next(task for task in every if task.name == "throughput of dpo")
    assert dpo.command[dpo.command.index("--rows") + 1] == "8"  # as many positions as 16 rows of 512


def test_parts_and_names_select(tmp_path):
    every = tasks(CardSetting(True, tmp_path))
    assert {task.part for task in card.select(every, Args(part=(3, 4)))} == {3, 4}
    assert [task.name for task in card.select(every, Args(only=("grpo",)))] == ["grpo"]
    with pytest.raises(ValueError, match="--part 12: choose from 1 to 11"):
        card.select(every, Args(part=(12,)))
    with pytest.raises(ValueError, match="--only nonsense: no task"):
        card.select(every, Args(only=("nonsense",)))


def test_a_module_that_is_missing_is_named(capsys):
    assert card_imports.main(["json", "no_such_module"]) == 1
    output = capsys.readouterr().out
    assert "no_such_module: ModuleNotFoundError" in output and "\n1 of 2 modules; " in output
    assert card_imports.main(["json"]) == 0


def test_a_pack_needs_built_libraries_and_a_clean_commit(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"_native_cpu\.so is not built from this source"):
        card_pack.built_libraries(tmp_path)
    report = {part: {"sources": card_pack.source_hash(ROOT, part)} for part in ("cpu", "cuda")}
    (tmp_path / "_native_build.json").write_text(json.dumps(report))
    for part in ("cpu", "cuda"):
        (tmp_path / f"_native_{part}.so").touch()
    assert len(card_pack.built_libraries(tmp_path)) == 3
    monkeypatch.setattr(card_pack, "git", lambda *_: b" M file.py")
    with pytest.raises(ValueError, match="uncommitted changes"):
        card_pack.clean_commit()


def test_a_packs_source_holds_the_libraries_and_no_pages(tmp_path, monkeypatch):
    library = tmp_path / "_native_cpu.so"
    library.write_text("code")
    committed = io.BytesIO()
    with tarfile.open(fileobj=committed, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("README.md"))
    commands = []
    monkeypatch.setattr(card_pack, "git", lambda *words: commands.append(words) or committed.getvalue())
    card_pack.write_source(tmp_path / "source.tar.gz", [library])
    assert archived(tmp_path / "source.tar.gz") == {"README.md": "", "minimind/_native_cpu.so": "code"}
    assert ":(exclude)docs" in commands[0]


def test_a_packs_text_needs_no_tokenizing(tmp_path):
    from minimind.data import open_corpus
    from minimind.tokenization import load_tokenizer

    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"document {i} " * 20}) + "\n" for i in range(50)))
    pack = tmp_path / "pack"
    pack.mkdir()
    console = Console(record=True, file=io.StringIO())
    card_pack.write_text(card_pack.Args(data=str(text), megabytes=0.005), pack, console)
    path = (pack / "text.jsonl.zst").rename(tmp_path / "text.jsonl.zst")
    (pack / "tokens").rename(tmp_path / "tokens")
    console = Console(record=True, file=io.StringIO())
    corpus = open_corpus([path], load_tokenizer(), tmp_path, console=console)
    assert 10 < corpus.num_documents < 30 and "tokenized" not in console.export_text()


@pytest.mark.slow
def test_the_rehearsal(tmp_path):
    """Every task on a CPU, three minutes; a stop in the middle leaves the archive."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"document {i} " * 60}) + "\n" for i in range(300)))
    command = [sys.executable, "bench/card.py", "--rehearse", "--minutes", "60", "--data", str(text)]
    command += ["--out", str(tmp_path)]
    environment = {**os.environ, "MINIMIND_CACHE": str(tmp_path / "cache")}
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, env=environment)
        for _ in range(600):
            time.sleep(0.1)
            if (tmp_path / "work" / "logs" / "imports.log").exists():
                break
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
    outcomes = states(json.loads(archived(tmp_path / "card.tar.gz")["card.json"]))
    assert (
        outcomes["imports"] == "cut"
        and outcomes["grpo"] == "not reached"
        and "archive:" in (tmp_path / "output").read_text()
    )
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    outcomes = states(json.loads(archived(tmp_path / "card.tar.gz")["card.json"]))
    assert set(outcomes.values()) == {"done", "needs a GPU"}


@pytest.mark.slow
def test_the_rehearsal_of_all(tmp_path):
    """Every further task, as `bench/card.py --rehearse --all` runs it."""
    command = [sys.executable, "bench/card.py", "--rehearse", "--all", "--out", str(tmp_path)]
    command += ["--part", *map(str, range(12, 19))]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr
