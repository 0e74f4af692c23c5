"""train/pretrain.py as a user runs it: a subprocess, killed and restarted."""

import json
import math
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from minimind import load_model, load_tokenizer
from minimind.data import open_corpus
from minimind.data.split import split
from minimind.training.arguments import StageArgs
from minimind.training.checkpoint import list_checkpoints
from tests import warm
from tests.training.runs import (
    ONE_THREAD,
    SCRIPT,
    as_killed,
    call,
    command,
    last_step,
    lines_of,
    reproducible,
    rows_of,
    run,
)

STEPS = 24
LENGTH = ["--tokens", str(512 * STEPS), "--save-every", "7"]


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    answer = run(command(data, out, *LENGTH))
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return out


def test_run_leaves_its_folder_and_learns(unbroken):
    for name in ("config.json", "metrics.jsonl", "loss.png", "samples.txt", "versions.json", "finished"):
        assert (unbroken / name).exists(), name
    assert (unbroken / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (unbroken / "samples.txt").read_text(encoding="utf-8").count("=== step") == 3
    rows = reproducible(unbroken)
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    assert steps == list(range(1, STEPS + 1))
    held_out = [row["heldout_loss"] for row in rows if row["kind"] == "eval"]
    assert held_out[0] > 8 and held_out[-1] < 3
    assert len(list((unbroken / "checkpoints").iterdir())) == 2  # keep-last-k
    assert json.loads((unbroken / "versions.json").read_text())["starts"][0]["torch"] == torch.__version__


def test_recorded_held_out_figures_are_those_of_the_saved_model(unbroken, data):
    """Nats per token and bits per byte, from the weights on disk and one unpacked document at a time."""
    model, tokenizer = load_model(unbroken), load_tokenizer(unbroken)
    _, held_out = split(open_corpus([data], tokenizer, data.parent / "cache"))
    nats = targets = 0.0
    for i in range(held_out.num_documents):
        ids = torch.from_numpy(held_out.document(i).astype("int64"))[None]
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits[0]
        nats += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        targets += ids.shape[1] - 1
    texts = [line["text"] for line in lines_of(held_out, data)]
    row = [row for row in reproducible(unbroken) if row["kind"] == "eval"][-1]
    assert row["heldout_all"] and row["heldout_tokens"] == targets
    # the recorded ones ran in this device's precision, here it is float32
    assert row["heldout_loss"] == pytest.approx(nats / targets, rel=0.01)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert row["heldout_bpb"] == pytest.approx(nats / math.log(2) / num_bytes, rel=0.01)
    trainer = torch.load(unbroken / "checkpoints" / f"step-{STEPS:08d}" / "trainer.pt", weights_only=True)
    assert trainer["step"] == STEPS


@pytest.mark.slow  # the smallest mixture preset has 145M parameters
def test_mixture_of_experts_resumes_to_the_bit_on_two_threads(data, tmp_path):
    tiny = ["--preset", "minimind2-moe", "--seq-len", "32", "--batch-tokens", "64", "--tokens", "192", "--heldout", "0"]
    both = {**ONE_THREAD, "OMP_NUM_THREADS": "2"}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run([*command(data, whole, *tiny, "--save-every", "1")], both).returncode == 0
    process = subprocess.Popen(command(data, cut, *tiny, "--save-every", "1"), stdout=subprocess.DEVNULL, env=both)
    while process.poll() is None and not (cut / "checkpoints" / "step-00000001").exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    answer = run(command(data, cut, *tiny, "--save-every", "1"), both)
    assert answer.returncode == 0 and "continuing after step" in answer.stdout
    assert reproducible(cut) == reproducible(whole)
    assert all(row["aux_loss"] > 0 for row in reproducible(whole))


def test_two_processes_do_not_train_in_one_folder(data, tmp_path):
    out = tmp_path / "shared"
    long = ["--tokens", str(512 * 2000)]  # far from done when the second starts
    first = warm.popen(command(data, out, *long), ONE_THREAD, stdout=subprocess.DEVNULL)
    while first.poll() is None and last_step(out) < 3:
        time.sleep(0.005)
    answer = run(command(data, out, *long))
    alive = first.poll() is None
    first.kill()
    first.wait()
    assert alive and answer.returncode == 2
    assert "another process is training in it" in answer.stdout


def test_killed_three_times_the_curve_is_the_same_to_the_bit(unbroken, data, tmp_path):
    """SIGKILL at random steps, the same command again: metrics and weights equal the unbroken run's. The first start is
    a process of its own, whose sets and dictionaries hash with another seed."""
    out = tmp_path / "killed"
    rng = random.Random(time.time_ns())
    kills = [3, *sorted(rng.sample(range(9, STEPS - 2, 3), 2))]  # the first before any checkpoint
    for step in kills:
        start = subprocess.Popen if step == kills[0] else warm.popen
        process = start(command(data, out, *LENGTH), stdout=subprocess.DEVNULL, env=ONE_THREAD)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None and last_step(out) < step:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"ended before step {step} of {kills}"
    answer = run(command(data, out, *LENGTH))
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "continuing after step" in answer.stdout
    assert reproducible(out) == reproducible(unbroken), f"killed at {kills}"
    assert (out / "samples.txt").read_text() == (unbroken / "samples.txt").read_text()
    last = f"checkpoints/step-{STEPS:08d}/model.safetensors"
    assert (out / last).read_bytes() == (unbroken / last).read_bytes()


def test_interrupt_saves_and_the_same_command_continues(unbroken, data, tmp_path):
    out = tmp_path / "interrupted"
    process = warm.popen(command(data, out, *LENGTH), ONE_THREAD, stdout=subprocess.PIPE)
    while process.poll() is None and last_step(out) < 9:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 130
    assert "saved; the same command continues" in text
    assert (out / "loss.png").exists() and not (out / "finished").exists()
    assert run(command(data, out, *LENGTH)).returncode == 0
    assert reproducible(out) == reproducible(unbroken)


def test_other_settings_do_not_continue_a_run(unbroken, data):
    answer = run(command(data, unbroken, *LENGTH))
    assert answer.returncode == 2 and "this run is finished" in answer.stdout
    (unbroken / "finished").unlink()
    answer = run(command(data, unbroken, *LENGTH, "--lr", "0.5"))
    (unbroken / "finished").touch()
    assert answer.returncode == 2
    assert "started with lr None (now 0.5); repeat that command (no --lr) or name another folder" in answer.stdout


def test_non_finite_loss_stops_with_its_batch_on_record(data, tmp_path):
    out = tmp_path / "burnt"
    answer = run(command(data, out, *LENGTH, "--lr", "1e30", "--warmup", "0", "--optimizer", "adamw"))
    assert answer.returncode == 2, answer.stdout
    assert "error: step" in answer.stdout and "nonfinite.json" in answer.stdout
    report = json.loads((out / "nonfinite.json").read_text())
    assert report["position"]["epoch"] == 0
    first = report["batches"][0][0]
    assert first["file"] == str(data) and " and " in first["begins"]
    assert (out / "loss.png").exists()
    for checkpoint in (out / "checkpoints").glob("step-*"):
        assert all(p.isfinite().all() for p in load_model(checkpoint).parameters())


def accumulated(data: Path, out: Path, micro: int, **flags) -> Path:
    """A run at a rate so low that rounding does not grow from step to step: AdamW's first steps follow the signs of
    gradients, and rounding decides the signs of the smallest."""
    call(SCRIPT, data=(str(data),), out=str(out), cache_dir=str(data.parent / "cache"), seq_len=64, batch_tokens=512,
         tokens=4096, precision="fp32", optimizer="adamw", lr=1e-7,
         **{"micro_tokens": micro, "log_every": 1, "evals": 1, "save_every": 4, **flags})  # fmt: skip
    return out


def assert_same_but_for_rounding(out: Path, truth: Path) -> None:
    """Loss and gradient norm of every step. What is left is the rounding of sums over 512 targets and over 2.8M
    squares, added up in another order."""
    eps = torch.finfo(torch.float32).eps
    assert [row["step"] for row in rows_of(out, "train")] == list(range(1, 9))
    for whole, parts in zip(rows_of(truth, "train"), rows_of(out, "train"), strict=True):
        assert parts["loss"] == pytest.approx(whole["loss"], rel=512**0.5 * eps)
        assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=2.8e6**0.5 * eps)
        assert [parts[name] for name in ("lr", "tokens", "targets")] == [
            whole[name] for name in ("lr", "tokens", "targets")
        ]


@pytest.fixture(scope="module")
def accumulated_whole(data, tmp_path_factory) -> Path:
    return accumulated(data, tmp_path_factory.mktemp("runs") / "whole", 512)


def test_accumulated_micro_batches_give_the_same_figures(data, accumulated_whole, tmp_path):
    assert_same_but_for_rounding(accumulated(data, tmp_path / "parts", 128), accumulated_whole)


def test_a_run_resumes_with_other_micro_batches(data, accumulated_whole, tmp_path):
    """As a user does after running out of memory. versions.json records the changed flags."""
    out = accumulated(data, as_killed(accumulated_whole, 4, tmp_path / "cut"), 128, recompute=True)
    assert_same_but_for_rounding(out, accumulated_whole)
    assert rows_of(out, "train")[:4] == rows_of(accumulated_whole, "train")[:4]
    assert rows_of(out, "train")[4:] != rows_of(accumulated_whole, "train")[4:]  # the micro-batches did change
    starts = json.loads((out / "versions.json").read_text())["starts"]
    assert starts[-1]["changed"] == {"micro_tokens": 128, "recompute": True} and "changed" not in starts[0]


def test_evaluations_change_no_bit(data, accumulated_whole, tmp_path):
    out = as_killed(accumulated_whole, 4, tmp_path / "cut")
    accumulated(data, out, 512, log_every=3, evals=8, save_every=1, keep_checkpoints=1, eval_tokens=4096, device="cpu")
    assert rows_of(out, "train") == rows_of(accumulated_whole, "train")
    assert len(rows_of(out, "eval")) == 1 + 4 and len(list_checkpoints(out)) == 1
    ours, theirs = list_checkpoints(out)[-1], list_checkpoints(accumulated_whole)[-1]
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()


BAD = {
    "absent file": (["--data", "absent.jsonl"], "absent.jsonl"),
    "bad batch": (["--batch-tokens", "500"], "--batch-tokens 500 must be a multiple"),
    "no gpu": (["--device", "cuda"], "use --device cpu"),
    "not a device": (["--device", "cuda:x"], "--device cuda:x: choose auto"),  # rich reads :x: as a red cross
    "no tokenizer": (["--tokenizer", "nowhere"], "nowhere"),
    "heldout": (["--heldout", "1.5"], "--heldout must be a fraction"),
    "negative heldout": (["--heldout", "-0.1"], "--heldout must be a fraction"),
    "no such gpu": (["--device", "cuda:99"], "--device cuda:99: PyTorch sees"),
    "more than the model knows": (["--seq-len", "8192"], "--seq-len 8192: the model knows 4096 positions"),
    "zero rows": (["--seq-len", "0"], "--seq-len 0: must be above 0"),
    "zero log": (["--log-every", "0"], "--log-every 0: must be above 0"),
    "no quarter": (["--batch-warmup", "0.5", "--batch-tokens", "128"], "take a quarter of 128 tokens"),
    "graph of nothing": (["--cuda-graph"], "--cuda-graph: goes with --compile"),
    "graph on a CPU": (["--cuda-graph", "--compile", "--device", "cpu"], "--cuda-graph: there is none on cpu"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_flags_are_one_clear_line(case, data, tmp_path):
    flags, message = BAD[case]
    if case == "no gpu" and torch.cuda.is_available():
        pytest.skip("this machine has the GPU that the case needs absent")
    answer = run(command(data, tmp_path / "out", *flags))
    assert answer.returncode == 2
    assert message in answer.stdout and "Traceback" not in answer.stdout + answer.stderr
    assert len([line for line in answer.stdout.splitlines() if "error:" in line]) == 1


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("lr", math.nan, "--lr nan: must be above 0"),
        ("epochs", math.inf, "--epochs inf: must be a number"),
        ("warmup", math.inf, "--warmup inf: a share of the steps, from 0 to 1"),
        ("weight_decay", math.nan, "--weight-decay nan: must be 0 or more"),
        ("seed", 1 << 64, "--seed 18446744073709551616: from 0 to"),
        ("final_lr", math.nan, "--final-lr nan: a share, from 0 to 1"),
        ("betas", (0.9, 1.0), "--betas 0.9 1.0: from 0 to less than 1"),
        ("muon_momentum", 1.0, "--muon-momentum 1.0: from 0 to less than 1"),
        ("embedding_lr", -1.0, "--embedding-lr -1.0: must be 0 or more"),
        ("muon_iterations", 0, "--muon-iterations 0: must be above 0"),
        ("muon_block", -1, "--muon-block -1: must be 0, for whole matrices, or more"),
        ("muon_row_beta", 1.0, "--muon-row-beta 1.0: from 0 to less than 1"),
        ("batch_warmup", 1.5, "--batch-warmup 1.5: a share, from 0 to 1"),
        ("momentum_warmup", -0.1, "--momentum-warmup -0.1: a share, from 0 to 1"),
    ],
)
def test_impossible_numbers_are_refused(flag, value, message):
    with pytest.raises(ValueError, match=message):
        StageArgs(**{flag: value}).check()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"cooldown": 0.3}, "--cooldown 0.3: goes with --schedule wsd, not cosine"),
        ({"final_lr": 0.0, "schedule": "constant"}, "--final-lr 0.0: the rate of --schedule constant does not fall"),
        ({"muon_momentum": 0.9, "optimizer": "adamw"}, "--muon-momentum 0.9: goes with --optimizer muon, not adamw"),
        ({"muon_iterations": 3, "optimizer": "adamw"}, "--muon-iterations 3: goes with --optimizer muon, not adamw"),
        ({"cautious_decay": True, "optimizer": "adamw"}, "--cautious-decay True: goes with --optimizer muon"),
        ({"batch_warmup": 0.5, "lengthen": "runs/x"}, "a run whose steps grow cannot be lengthened"),
    ],
)
def test_a_flag_without_effect_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        StageArgs(**flags).check()


def test_malformed_row_names_file_and_line(data, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": "cut\n{"text": "also fine"}\n{"text": "and this"}\n')
    answer = run(command(bad, tmp_path / "out"))
    assert answer.returncode == 2 and f"{bad}:2" in answer.stdout and "--on-bad-row skip" in answer.stdout
    answer = run(command(bad, tmp_path / "out2", "--on-bad-row", "skip", "--tokens", "512", "--heldout", "0"))
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "1 bad row" in answer.stdout + answer.stderr


@pytest.mark.heavy
def test_profile_and_recomputation_change_nothing(unbroken, data, tmp_path):
    out = tmp_path / "profiled"
    answer = run(command(data, out, *LENGTH, "--profile", "--recompute"))
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert reproducible(out) == reproducible(unbroken)
    for name in ("trace.json.gz", "timeline.png"):
        assert (out / "profile" / name).stat().st_size > 1000
    assert "backward" in answer.stdout and "mm" in answer.stdout


@pytest.mark.slow
def test_compiled_run_resumes(data, tmp_path):
    """Resume with compile on is what upstream could not do; the second process takes the first one's machine code."""
    out, built = tmp_path / "compiled", tmp_path / "inductor"
    kept = {**ONE_THREAD, "TORCHINDUCTOR_CACHE_DIR": str(built)}
    flags = ["--compile", "--tokens", str(512 * 12), "--save-every", "4"]
    process = subprocess.Popen(command(data, out, *flags), stdout=subprocess.DEVNULL, env=kept)
    while process.poll() is None and last_step(out) < 6:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    libraries = set(built.rglob("*.so"))
    answer = run(command(data, out, *flags), kept)
    assert answer.returncode == 0 and "continuing after step" in answer.stdout
    assert libraries and set(built.rglob("*.so")) == libraries
    assert [r["step"] for r in reproducible(out) if r["kind"] == "train"] == list(range(1, 13))
    names = set(load_model(out).state_dict())
    assert not any("_orig_mod" in name for name in names)
