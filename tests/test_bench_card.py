"""bench/card.py: questions are cut in time, a cut leaves the archive, a second call goes on; every command exists."""

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
from bench.cards.questions import OF_A_CARD, CardQuestion, CardSetting, questions

ROOT = Path(__file__).parents[1]


@pytest.fixture
def here(tmp_path) -> CardRun:
    return CardRun(tmp_path / "work", tmp_path / "card.tar.gz", "abc", Console(quiet=True), {}, dict(os.environ))


def python(name: str, code: str, **fields) -> CardQuestion:
    return CardQuestion(name, (sys.executable, "-S", "-c", code), **{"part": 1, **fields})


def archived(path: Path) -> dict[str, str]:
    with tarfile.open(path) as tar:
        return {e.name: tar.extractfile(e).read().decode(errors="replace") for e in tar if e.isfile()}


def states(state: dict) -> dict[str, str]:
    return {name: entry["state"] for name, entry in state.items()}


FOUR = (
    python("good one", "print('all is [well]')"),
    python("bad one", "print('what went wrong'); raise SystemExit(3)"),
    CardQuestion("other", ("x",), needs="no-such-program", part=2),
    python("with a card", "raise SystemExit(1)", card=True, part=2),
)


def test_each_question_has_a_state_and_a_line(here, capsys):
    here.console, here.rehearse = Console(width=120), True
    assert card.put(here, FOUR, Args()) == 1
    files = archived(here.archive)
    assert states(json.loads(files["card.json"])) == {
        "good one": "done",
        "bad one": "failed 3",
        "other": "no no-such-program",
        "with a card": "needs a GPU",
    }
    assert files["logs/bad-one.log"] == "what went wrong\n"
    assert not card.earlier(here.work / "card.json", rehearse=False), "a rehearsal is no answer of a card"
    table = files["card.md"].splitlines()
    assert table[2].startswith("| good one | done | 0 | all is [well] |") and "what went wrong" in table[3]
    shown = capsys.readouterr().out
    assert "all is [well]" in shown and "3 of 4 questions to ask" in shown and str(here.archive) in shown


def test_a_second_call_goes_on_with_what_is_not_done(here, tmp_path):
    here.begin(FOUR)
    assert [q.name for q in here.order(FOUR, again=False)] == [q.name for q in FOUR]
    for question in FOUR[:2]:
        here.ask(question)
    card_report.unpack(here.archive, tmp_path / "elsewhere")
    here.work = tmp_path / "elsewhere"
    here.state = card.earlier(here.work / "card.json", rehearse=False)
    assert states(here.state)["good one"] == "done"
    names = [q.name for q in here.order(FOUR, again=False)]
    assert names == ["other", "with a card", "bad one"], "what failed at this commit comes last"
    assert here.order(FOUR, again=True)[-2:] == list(FOUR[:2])
    here.commit = "def"
    assert [q.name for q in here.order(FOUR, again=False)] == ["bad one", "other", "with a card"]


def test_nothing_is_begun_that_does_not_fit(here):
    here.deadline = time.monotonic() + card.PACKING + 30
    asked = [python("long one", "", minutes=1.0), python("short one", "", minutes=0.1)]
    here.begin(asked)
    here.go_on(asked)
    assert states(here.state) == {"long one": "not reached", "short one": "done"}


@pytest.mark.parametrize("by", ["estimate", "deadline"])
def test_a_question_is_cut_after_twice_its_estimate_and_at_the_end(here, by):
    minutes = 0.002 if by == "estimate" else 1.0
    if by == "deadline":
        here.deadline = time.monotonic() + card.PACKING + 0.25
    start = time.monotonic()
    here.ask(python("slow", "import time; time.sleep(60)", minutes=minutes))
    assert time.monotonic() - start < 10
    assert states(here.state) == states(json.loads(archived(here.archive)["card.json"])) == {"slow": "cut"}


def test_the_archive_is_there_while_a_question_runs(here):
    """As when the machine is taken away: nothing of ours gets to run."""
    here.every = 0.1
    code = "print('half of it', flush=True)\nimport time; time.sleep(0.5)\nprint('the rest')"
    seen = []
    original = here.keep

    def keep():
        result = original()
        seen.append(archived(here.archive))
        return result

    here.keep = keep
    here.ask(python("slow", code, minutes=1))
    during = [files for files in seen if files.get("logs/slow.log") == "half of it\n"]
    assert during and states(json.loads(during[0]["card.json"])) == {"slow": "cut"}
    assert states(here.state) == {"slow": "done"} and here.state["slow"]["said"] == "the rest"


def test_what_is_too_large_stays_behind_and_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(card_report, "LARGEST", 10)
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "small").write_text("1234567890")
    (tmp_path / "a" / "large").write_text("1234567890 and more")
    assert card_report.pack(tmp_path / "a", tmp_path / "it.tar.gz") == ["large"]
    assert archived(tmp_path / "it.tar.gz") == {"b/small": "1234567890"}


def test_what_a_question_said(tmp_path):
    log = tmp_path / "log"
    assert card_report.said(log) == ""
    rows = [
        {"peer": "ours", "positions_per_second": 1234.5},
        {"peer": "naive", "tokens_per_second": 10.0, "status": "ok"},
        {"peer": "hf", "status": "failed", "reason": "no"},
    ]
    log.write_text(f"sft, nano: without liger: needs a GPU\n{json.dumps({'rows': rows})}\nafter\n")
    assert card_report.said(log) == "ours 1,234/s; naive 10/s; hf failed; without liger"
    times = [
        {"op": "rope", "contender": name, "phase": phase, "ratio": 1.5, "status": "ok"}
        for name in ("minimind", "liger")
        for phase in ("forward", "both")
    ]
    log.write_text(json.dumps({"rows": times}))
    assert card_report.said(log) == "rope liger 1.50x"
    log.write_text("step 1 loss 9\nstep 2 loss 8\nheld-out 7\nfinished\n")
    assert card_report.said(log, ("step", "held-out", "never")) == "step 2 loss 8; held-out 7"
    assert card_report.said(log, ("never",)) == "finished"


@pytest.mark.parametrize("rehearse", [False, True])
def test_every_command_parses(rehearse, tmp_path):
    """With the dataclass of its own script, so that a flag that was renamed does not fail on a borrowed card."""
    asked = questions(CardSetting(rehearse, tmp_path, ("a.jsonl",)))
    assert [q.part for q in asked] == sorted(q.part for q in asked) and asked[0].name == "imports"
    assert {q.part for q in asked} == set(range(1, 12)) and len({q.name for q in asked}) == len(asked)
    assert set(OF_A_CARD).isdisjoint(asked[0].command) == rehearse
    for question in asked:
        assert 0 < question.minutes <= 2, "twice that is what it may take"
        script = next((part for part in question.command if part.endswith(".py")), "")
        if script.startswith(("bench/", "train/")) and question.name != "imports":
            module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
            args = tyro.cli(module.Args, args=list(question.command[question.command.index(script) + 1 :]))
            wherever = getattr(args, "out", None)
            assert wherever is None or wherever.startswith(str(tmp_path))


def test_parts_and_names_choose(tmp_path):
    asked = questions(CardSetting(True, tmp_path))
    assert {q.part for q in card.wanted(asked, Args(part=(3, 4)))} == {3, 4}
    assert [q.name for q in card.wanted(asked, Args(only=("grpo",)))] == ["grpo"]
    with pytest.raises(ValueError, match="--part 12: choose from 1 to 11"):
        card.wanted(asked, Args(part=(12,)))
    with pytest.raises(ValueError, match="--only nonsense: no question"):
        card.wanted(asked, Args(only=("nonsense",)))


def test_a_module_that_is_missing_is_named(capsys):
    assert card_imports.main(["json", "no_such_module"]) == 1
    said = capsys.readouterr().out
    assert "no_such_module: ModuleNotFoundError" in said and "\n1 of 2 modules; " in said
    assert card_imports.main(["json"]) == 0


def test_a_pack_refuses_what_is_not_built_or_not_committed(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"_native_cpu\.so is not built from this source"):
        card_pack.built_libraries(tmp_path)
    report = {part: {"sources": card_pack.source_hash(ROOT, part)} for part in ("cpu", "cuda")}
    (tmp_path / "_native_build.json").write_text(json.dumps(report))
    for part in ("cpu", "cuda"):
        (tmp_path / f"_native_{part}.so").touch()
    assert len(card_pack.built_libraries(tmp_path)) == 3
    monkeypatch.setattr(card_pack, "git", lambda *_: b" M file.py")
    with pytest.raises(ValueError, match="not committed"):
        card_pack.clean_commit()


def test_a_packs_source_holds_the_libraries_and_no_pages(tmp_path, monkeypatch):
    library = tmp_path / "_native_cpu.so"
    library.write_text("code")
    committed = io.BytesIO()
    with tarfile.open(fileobj=committed, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("README.md"))
    asked = []
    monkeypatch.setattr(card_pack, "git", lambda *words: asked.append(words) or committed.getvalue())
    card_pack.write_source(tmp_path / "source.tar.gz", [library])
    assert archived(tmp_path / "source.tar.gz") == {"README.md": "", "minimind/_native_cpu.so": "code"}
    assert ":(exclude)docs" in asked[0]


def test_a_packs_text_is_found_tokenized(tmp_path):
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
    """Every question in its CPU form, three minutes; a stop in its midst leaves the archive."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"document {i} " * 60}) + "\n" for i in range(300)))
    command = [sys.executable, "bench/card.py", "--rehearse", "--minutes", "60", "--data", str(text)]
    command += ["--out", str(tmp_path)]
    environment = {**os.environ, "MINIMIND_CACHE": str(tmp_path / "cache")}
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said, env=environment)
        for _ in range(600):
            time.sleep(0.1)
            if (tmp_path / "work" / "logs" / "imports.log").exists():
                break
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
    found = states(json.loads(archived(tmp_path / "card.tar.gz")["card.json"]))
    assert found["imports"] == "cut" and found["grpo"] == "not reached" and "archive:" in said_by(tmp_path)
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    found = states(json.loads(archived(tmp_path / "card.tar.gz")["card.json"]))
    assert set(found.values()) == {"done", "needs a GPU"}


def said_by(folder: Path) -> str:
    return (folder / "said").read_text()
