"""Run folders: nothing is overwritten, and an unfinished run of the same configuration is continued."""

import os
import sys

import pytest

from minimind.training import metrics
from minimind.training.checkpoint import list_checkpoints
from minimind.training.run_folder import Defaults, find_run, newest_finished, open_run, record_versions, truncate

CONFIG = {"stage": "pretrain", "args": {"lr": 1e-3, "data": ("a", "b")}}


def opened(*arguments):
    """open_run as another process would find it afterwards: the lock is free again."""
    run = open_run(*arguments)
    run.lock.release()
    return run


def test_auto_continues_the_unfinished_run_only(tmp_path):
    first = opened(None, "x", CONFIG, "auto", tmp_path)
    assert (first.path.name, first.checkpoint) == ("x", None)
    assert opened(None, "x", CONFIG, "auto", tmp_path).path == first.path  # killed before its first checkpoint
    (first.path / "checkpoints" / "step-00000010").mkdir(parents=True)
    (first.path / "checkpoints" / "step-00000020").mkdir()
    (first.path / "checkpoints" / ".partial-00000030-1").mkdir()
    again = opened(None, "x", CONFIG, "auto", tmp_path)
    assert again.checkpoint is not None and again.checkpoint.name == "step-00000020"
    assert not list(first.path.glob("checkpoints/.partial*"))
    assert opened(None, "x", CONFIG, "never", tmp_path).path.name == "x-2"
    other = {**CONFIG, "args": {"lr": 2e-3}}
    assert opened(None, "x", other, "auto", tmp_path).path.name == "x-3"
    first.mark_finished()
    assert opened(None, "x", CONFIG, "auto", tmp_path).path.name == "x-2"
    elsewhere = {**CONFIG, "args": {**CONFIG["args"], "cache_dir": "/other"}}
    assert opened(None, "x", elsewhere, "auto", tmp_path).path.name == "x-2"


FREE = {"log_every": 1, "save_every": 7, "keep_checkpoints": 9, "evals": 3, "eval_questions": 8, "device": "cpu",
        "micro_tokens": 512, "micro_batches": 2, "compile": True, "recompute": True, "fused": False, "show": 4,
        "eval_tokens": 99}  # fmt: skip


@pytest.mark.parametrize("out", [True, False])
def test_flags_that_change_no_step_continue_a_run_and_are_reported(tmp_path, out):
    place = (str(tmp_path / "x") if out else None, "x")
    first = opened(*place, {"args": {"lr": 0.1, **dict.fromkeys(FREE)}}, "auto", tmp_path)
    again = opened(*place, {"args": {"lr": 0.1, **FREE}}, "auto", tmp_path)
    assert again.path == first.path and again.changed == FREE
    (note,) = again.notes
    assert note.startswith("continues with other flags: compile None (now True), device None (now cpu), ")
    assert find_run(*place, {"args": {"lr": 0.1, **FREE}}, "auto", Defaults({}, {"seq_len": 4}), tmp_path)


@pytest.mark.parametrize("name", ["keep_best", "patience"])
def test_eval_tokens_count_with_keep_best(tmp_path, name):
    opened(None, "x", {"args": {name: 1, "eval_tokens": 5, "evals": 2}}, "auto", tmp_path)
    for flags, number in (({"eval_tokens": 6, "evals": 2}, "x-2"), ({"eval_tokens": 5, "evals": 3}, "x")):
        assert opened(None, "x", {"args": {name: 1, **flags}}, "auto", tmp_path).path.name == number


def test_a_new_run_names_the_most_similar_unfinished_run(tmp_path):
    def start(**flags):
        before = {"lr": 0.1, "dora": False, "data": ["a", "b"], "tokens": None}
        return opened(None, "x", {"args": {**before, **flags}}, "auto", tmp_path)

    first = start()
    (first.path / "checkpoints" / "step-00000020").mkdir(parents=True)
    assert first.notes == ()
    assert start(lr=None, dora=True, data=["a"]).notes == (
        f"near: {first.path}, unfinished after step 20, was started with data a b (now a), dora False (now True), "
        "lr 0.1 (now None); --data a b --no-dora --lr 0.1 continues it; this run starts anew",
    )
    longer = f"; no --tokens continues it, --lengthen {first.path} goes on with it to a greater length; this run"
    assert longer in start(tokens=99).notes[0]


def test_a_new_run_names_the_finished_run_that_could_be_lengthened(tmp_path):
    first = opened(None, "x", CONFIG, "auto", tmp_path)
    first.mark_finished()
    longer = {**CONFIG, "args": {**CONFIG["args"], "epochs": 2}}
    (note,) = opened(None, "x", longer, "auto", tmp_path).notes
    assert note.startswith(
        f"near: {first.path}, finished, was started with epochs None (now 2); --lengthen {first.path}"
    )
    (note,) = opened(None, "x", CONFIG, "auto", tmp_path).notes
    assert note == f"{first.path} is this very run, finished: it is trained anew"
    with pytest.raises(
        ValueError, match=r"x: started with epochs None \(now 2\); to lengthen it use --lengthen .*x with"
    ):
        opened(str(first.path), "x", longer, "auto", tmp_path)


def test_differences_are_reported_by_flag(tmp_path):
    def start(source: str, weights: str, hidden: int):
        flags = {"from": source, "preset": None, "lr": 1}
        return opened(None, "x", {"args": flags, "weights": weights, "model": {"hidden": hidden}}, "auto", tmp_path)

    start("a", "step-1 abc", 64)
    (note,) = start("a", "step-1 fed", 64).notes
    assert "was started with weights step-1 abc (now step-1 fed); this run starts anew" in note
    assert start("moved", "step-1 fed", 64).notes == ("continues with other flags: from a (now moved)",)
    assert "started with from a (now b); --from a continues it;" in start("b", "step-1 def", 32).notes[0]


LEGACY = Defaults({"seq_len": None, "dedupe": False}, {"seq_len": 512, "split": "tail"})


def now(**args) -> dict:
    return {"stage": "sft", "args": {"lr": None, "seq_len": None, "dedupe": False, **args}, "model": {}}


def test_a_missing_choice_is_no_difference(tmp_path):
    """A run without a choice is compared by the choices of the newer start."""
    opened(None, "x", now() | {"chosen": {"seq_len": 8}}, "auto", tmp_path)
    (note,) = opened(None, "x", now(lr=0.5) | {"chosen": {"seq_len": 8}}, "auto", tmp_path, LEGACY).notes
    assert "was started with lr None (now 0.5); no --lr continues it" in note


@pytest.mark.parametrize("out", [True, False])
def test_a_run_of_an_earlier_version_resumes_unchanged(tmp_path, out):
    """Its configuration lacks newer flags, and has fixed values where the data decides now."""
    place = (str(tmp_path / "x") if out else None, "x")
    old = {"stage": "sft", "args": {"lr": None, "seq_len": 512}, "model": {}}
    first = opened(*place, old, "auto", tmp_path)
    found = find_run(*place, now(), "auto", LEGACY, tmp_path)
    assert found == {"seq_len": 512, "split": "tail"}
    again = opened(*place, now() | {"chosen": found}, "auto", tmp_path, LEGACY)
    assert again.path == first.path
    explicit = find_run(*place, now(seq_len=512), "auto", LEGACY, tmp_path)
    assert explicit == {"split": "tail"}
    for other in (now(seq_len=1024), now(dedupe=True), now(lr=0.1)):
        assert find_run(*place, other, "auto", LEGACY, tmp_path) == {}
    assert find_run(*place, now(), "never", LEGACY, tmp_path) == {}
    first.mark_finished()
    assert find_run(*place, now(), "auto", LEGACY, tmp_path) == {}


def test_a_run_with_required_epochs_and_optimizer_resumes(tmp_path):
    """Its folder records other choices, and these two as flags with values."""
    defaults = Defaults(
        {"epochs": None, "optimizer": None, "seq_len": None}, {"epochs": 3.0, "optimizer": "muon", "seq_len": 512}
    )
    args = {"epochs": 3.0, "optimizer": "muon", "seq_len": None}
    old = {"stage": "sft", "args": args, "chosen": {"seq_len": 1024}}
    first = opened(None, "x", old, "auto", tmp_path)
    new = {"stage": "sft", "args": dict.fromkeys(args)}
    found = find_run(None, "x", new, "auto", defaults, tmp_path)
    assert found == {"seq_len": 1024, "epochs": 3.0, "optimizer": "muon"}
    assert opened(None, "x", new | {"chosen": found}, "auto", tmp_path, defaults).path == first.path
    for name, value in (("epochs", 2.0), ("optimizer", "adamw"), ("seq_len", 512)):
        other = {"stage": "sft", "args": {**new["args"], name: value}}
        assert find_run(None, "x", other, "auto", defaults, tmp_path) == {}
    same = {"stage": "sft", "args": {**new["args"], "epochs": 3.0}}
    assert find_run(None, "x", same, "auto", defaults, tmp_path) == {"seq_len": 1024, "optimizer": "muon"}


def test_choices_are_found_again(tmp_path):
    chosen = {"seq_len": 2048, "split": "hash"}
    opened(None, "x", now(lr=0.5) | {"chosen": {"seq_len": 1024, "split": "hash"}}, "auto", tmp_path)
    second = opened(None, "x", now() | {"chosen": chosen}, "auto", tmp_path, LEGACY)
    assert second.path.name == "x-2"
    assert find_run(None, "x", now(), "auto", LEGACY, tmp_path) == chosen
    assert opened(None, "x", now() | {"chosen": chosen}, "auto", tmp_path, LEGACY).path == second.path
    assert find_run(None, "x", now(seq_len=512), "auto", LEGACY, tmp_path) == {}
    with pytest.raises(ValueError, match=r"started with chosen\.seq_len 2048 \(now 512\)"):
        opened(str(second.path), "x", now() | {"chosen": chosen | {"seq_len": 512}}, "auto", tmp_path, LEGACY)


def test_equal_choices_and_flags_make_the_same_run(tmp_path, monkeypatch):
    """Flags equal to what the data decided, paths from another working directory, and a model that was moved."""
    monkeypatch.chdir(tmp_path)
    chosen = {"seq_len": 1024, "split": "hash", "batch_tokens": 4096}
    known = {"weights": "step-00000100 abc"}
    first = opened(None, "x", now(data=["a.jsonl"]) | {"chosen": chosen} | known, "auto", tmp_path, LEGACY)
    said = now(data=[f"{tmp_path}/./a.jsonl"], seq_len=1024, preset="nano") | {"weights": "moved abc"}
    assert find_run(None, "x", said, "auto", LEGACY, tmp_path) == chosen
    left = {"chosen": {"split": "hash", "batch_tokens": 4096}}
    assert opened(None, "x", said | left, "auto", tmp_path, LEGACY).path == first.path
    for other in ({"seq_len": 512}, {"data": ["b.jsonl"]}):
        config = said | {"args": said["args"] | other}
        assert find_run(None, "x", config, "auto", LEGACY, tmp_path) == {}
        assert opened(None, "x", config | left, "auto", tmp_path, LEGACY).path != first.path
    assert find_run(None, "x", said | {"weights": "moved def"}, "auto", LEGACY, tmp_path) == {}


def test_a_run_in_progress_is_left_alone(tmp_path):
    running = open_run(None, "x", CONFIG, "auto", tmp_path)
    (running.path / "checkpoints" / ".partial-00000030-1").mkdir(parents=True)
    assert open_run(None, "x", CONFIG, "auto", tmp_path).path.name == "x-2"
    with pytest.raises(ValueError, match="another process is training in it"):
        open_run(str(running.path), "x", CONFIG, "auto")
    assert list(running.path.glob("checkpoints/.partial*"))


def test_named_folder_refuses_what_would_lose_something(tmp_path):
    out = str(tmp_path / "mine")
    run = opened(out, "x", CONFIG, "auto")
    other = {**CONFIG, "args": {**CONFIG["args"], "lr": 2e-3}}
    with pytest.raises(ValueError, match=r"started with lr 0\.001 \(now 0\.002\); repeat that command"):
        opened(out, "x", other, "auto")
    with pytest.raises(ValueError, match="already holds a run"):
        opened(out, "x", CONFIG, "never")
    run.mark_finished()
    with pytest.raises(ValueError, match="this run is finished"):
        opened(out, "x", CONFIG, "auto")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and not a run folder"):
        opened(str(tmp_path / "other"), "x", CONFIG, "auto")
    thesis = str(tmp_path / "other" / "thesis.txt")
    with pytest.raises(ValueError, match=r"--out .*thesis\.txt: is a file; name a folder"):
        opened(thesis, "x", CONFIG, "auto")
    with pytest.raises(ValueError, match=r"thesis\.txt/in: cannot be made \(.*\); name another folder with --out"):
        opened(f"{thesis}/in", "x", CONFIG, "auto")


def test_truncate_cuts_what_came_after_the_checkpoint(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text("one\ntwo\nthree\n")
    truncate(log, 4)
    assert log.read_text() == "one\n"
    truncate(tmp_path / "absent", 0)
    with pytest.raises(ValueError, match=r"metrics\.jsonl: has 4 bytes, fewer than the 99 at the checkpoint"):
        truncate(log, 99)


def test_list_checkpoints_is_ordered(tmp_path):
    for step in (1000, 20, 300):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    assert [c.name for c in list_checkpoints(tmp_path)] == ["step-00000020", "step-00000300", "step-00001000"]


class FakeService:
    """Stands for trackio, wandb or swanlab: remembers how it was called."""

    def __init__(self):
        self.calls = []
        self.id = "service-made-id"

    def init(self, **kwargs):
        self.calls.append(kwargs)
        self.id = kwargs.get("id") or self.id
        return self

    def log(self, values, step):
        self.calls.append((step, values))

    def finish(self):
        self.calls.append("finish")


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_tracker_id_is_made_once_and_used_again(name, tmp_path, monkeypatch):
    service = FakeService()
    monkeypatch.setitem(sys.modules, name, service)
    first = metrics.make_tracker(name, tmp_path, {"lr": 1}, {}, 0)
    assert first.run_id == "service-made-id"
    saved = {"name": first.name, "id": first.run_id}
    again = metrics.make_tracker(name, tmp_path, {"lr": 1}, saved, 50)
    again.log(60, {"loss": 2.0})
    assert service.calls[1]["id"] == "service-made-id" and service.calls[1]["resume"] == "allow"
    assert service.calls[2] == (60, {"loss": 2.0})
    metrics.make_tracker(name, tmp_path, {}, {"name": "another", "id": "x"}, 50)
    assert service.calls[3]["id"] is None


def test_trackio_knows_a_run_by_its_name(tmp_path, monkeypatch):
    service = FakeService()
    monkeypatch.setitem(sys.modules, "trackio", service)
    folder = tmp_path / "pretrain-nano"
    first, other = (metrics.make_tracker("trackio", folder, {"lr": 1}, {}, 0) for _ in range(2))
    assert first.run_id != other.run_id and first.run_id.startswith("pretrain-nano-")
    again = metrics.make_tracker("trackio", folder, {"lr": 1}, {"name": "trackio", "id": first.run_id}, 50)
    assert again.run_id == first.run_id
    assert service.calls[2] == {"project": "minimind", "config": {"lr": 1}, "resume": "allow", "name": first.run_id}


@pytest.mark.parametrize("name", ["trackio", "wandb", "swanlab", "tensorboard"])
def test_a_tracker_that_fails_is_left_behind(name, tmp_path, monkeypatch, capsys):
    """If its network or disk fails, the run goes on. A failure at its start is an error before anything is computed."""
    service = FakeService()
    monkeypatch.setitem(sys.modules, name, service)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", service)
    service.SummaryWriter = lambda *_, **__: service
    tracker = metrics.make_tracker(name, tmp_path, {}, {}, 0)
    service.log = service.add_scalar = service.finish = service.close = None  # as good as a network that is gone
    for _ in range(3):
        tracker.log(1, {"loss": 2.0})
    tracker.finish()
    said = capsys.readouterr().err
    assert said.startswith(f"--track {name}: the run continues without it ('NoneType' object") and said.count("\n") == 1
    if name != "tensorboard":
        service.init = lambda **_: 1 / 0
        with pytest.raises(ValueError, match=f"--track {name}: division by zero; drop the flag"):
            metrics.make_tracker(name, tmp_path, {}, {}, 0)


def test_missing_tracker_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"--track wandb: the package is not installed; run `pip install"):
        metrics.make_tracker("wandb", tmp_path, {}, {}, 0)


def test_tensorboard_curve(tmp_path):
    pytest.importorskip("tensorboard", reason="install minimind[track]")
    tracker = metrics.make_tracker("tensorboard", tmp_path, {}, {}, 0)
    tracker.log(1, {"loss": 2.5})
    tracker.finish()
    assert b"loss" in next(tmp_path.glob("tensorboard/events*")).read_bytes()


def test_the_newest_run_is_of_a_task_only_on_request(tmp_path):
    task = ("builtin:arithmetic",)
    for age, (name, data) in enumerate({"old": (), "chats": ("a.jsonl",), "sums": task}.items()):
        run = opened(None, name, {"stage": "sft", "args": {"data": data}}, "auto", tmp_path)
        run.mark_finished()
        os.utime(run.path / "finished", (age, age))
    assert newest_finished("sft", tmp_path) == str(tmp_path / "chats")
    assert newest_finished("sft", tmp_path, task) == str(tmp_path / "sums")
    assert newest_finished("sft", tmp_path, ()) == str(tmp_path / "old")
    with pytest.raises(ValueError, match=r"--from: there is no finished run of train/dpo.py"):
        newest_finished("dpo", tmp_path)


def test_a_folder_that_cannot_be_locked_is_named(tmp_path):
    (tmp_path / "mine" / ".lock").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"mine: cannot be written \(.*\); name another folder with --out"):
        opened(str(tmp_path / "mine"), "x", CONFIG, "auto")


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_damaged_files_of_a_run_are_named(tmp_path, content):
    run = opened(str(tmp_path / "mine"), "x", CONFIG, "auto")
    record_versions(run, "a device", "documents")
    (tmp_path / "mine" / "versions.json").write_text(content)
    with pytest.raises(ValueError, match=r"versions\.json: damaged; remove it"):
        record_versions(run, "a device", "documents")
    (tmp_path / "mine" / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json: not .*; name another --out"):
        opened(str(tmp_path / "mine"), "x", CONFIG, "auto")
