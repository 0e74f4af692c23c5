"""The commands that bench/time_to_loss.py runs: their data, folders, flags and speed.

Upstream's own trainer runs in a copy of its checkout. It has no held-out figures, so the weights that it saves are kept
as they appear, and evaluated after the run.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.common.record import ROOT
from bench.training.loss_curves import CurvePoint, TimeToLossRow, Watched, point_of, run_and_poll, watch
from bench.training.recipes import RecipeSetting, heldout_figures, open_data
from minimind.config import ModelConfig
from minimind.data import read_documents
from minimind.data.split import hash_texts
from minimind.tokenization import load_tokenizer
from minimind.training.batches import GPU_BATCH
from minimind.training.metrics import read_metrics
from minimind.utils.device import choose_device
from minimind.weights import load_model

COMPILED = 10  # times the median: a step that compiled something took at least this long
PROBE = 6  # steps of the run that measures the speed
STEP = 4096  # tokens of a step on a CPU for transformers; ours are counted in such steps, and takes its own
MOST_HELDOUT = 0.2  # of a small file
PADDED = 339  # inputs of upstream's row of 340 tokens
SAVES = 4  # of upstream's trainer in a run
UPSTREAM_HEADS = 8  # query heads in all of its versions
_LOGGED = re.compile(r"Epoch:\[(\d+)/\d+\]\((\d+)/\d+\)")


def split_file(path: str, stage: str, work: Path, heldout_bytes: int) -> tuple[Path, Path]:
    """(training, held-out) .jsonl files with the texts or conversations of `path`. Those with the lowest hashes are
    held out, about `heldout_bytes` but at most a fifth of all; so copies stay on one side. Made once under `work`."""
    source = Path(path).expanduser().resolve()
    stamp = f"{source} {source.stat().st_size} {source.stat().st_mtime_ns} {heldout_bytes}"
    folder = work / "texts" / f"{source.stem}-{blake2b(stamp.encode(), digest_size=6).hexdigest()}"
    train, heldout = folder / "train.jsonl", folder / "heldout.jsonl"
    if train.exists():
        return train, heldout
    rows = [line for line in _rows(source, stage) if line]
    order = sorted(zip(hash_texts(rows).tolist(), range(len(rows)), strict=True))
    limit = min(heldout_bytes, MOST_HELDOUT * sum(len(row.encode()) for row in rows))
    held: set[int] = set()
    size, previous = 0, None
    for digest, number in order:
        if size >= limit and digest != previous:
            break
        held.add(number)
        size, previous = size + len(rows[number].encode()), digest
    folder.mkdir(parents=True, exist_ok=True)
    _write(heldout, (row for i, row in enumerate(rows) if i in held))
    _write(train, (row for i, row in enumerate(rows) if i not in held))  # last: it says that both are complete
    return train, heldout


def _rows(path: Path, stage: str) -> Iterable[str]:
    if stage == "sft":
        return path.read_text(encoding="utf-8").splitlines()
    return (json.dumps({"text": document.text}, ensure_ascii=False) for document in read_documents(path))


def _write(path: Path, rows: Iterable[str]) -> None:
    unfinished = path.with_suffix(".part")
    with unfinished.open("w", encoding="utf-8") as file:
        file.writelines(row + "\n" for row in rows)
    unfinished.replace(path)


@dataclass(frozen=True)
class RunPlan:
    """One run. name: the implementation; data: the name of its file; parts: (training, held-out) files; minutes: the
    time that its steps are planned to fill; lr: the peak rate, None where the command chooses; rows, accumulation: of
    upstream's steps; init: the weights that SFT begins with; questions: answered in an evaluation; upstream, python:
    its checkout and the Python that runs it."""

    stage: str
    name: str
    data: str
    parts: tuple[Path, Path]
    preset: str
    seed: int
    minutes: float
    work: Path
    lr: float | None = None
    rows: int = 8
    accumulation: int = 1
    init: Path | None = None
    questions: int = 0
    device: str = "auto"
    evals: int = 8
    upstream: str | None = None
    python: str = sys.executable

    @property
    def folder(self) -> Path:
        rate = "" if self.lr is None else f"-{self.lr:g}"
        data = re.sub(r"\W+", "-", self.data)
        return self.work / f"{self.stage}-{self.name}{rate}-{data}-{self.preset}-{self.minutes:g}min-seed{self.seed}"

    @property
    def is_ours(self) -> bool:
        return self.name in ("ours", "ours-eager")

    @property
    def metrics(self) -> Path:
        return self.folder / ("run" if self.is_ours else "") / "metrics.jsonl"

    @property
    def weights(self) -> Path:
        """The run folder, or the folder of weights, at the end of the run."""
        return self.folder / ("run" if self.is_ours else "weights")

    def is_of(self, row: TimeToLossRow) -> bool:
        """Whether this is the row of this run."""
        own = (self.stage, self.name, self.data, self.preset, self.seed, self.lr, round(self.minutes, 6))
        return own == (row.stage, row.implementation, row.data, row.preset, row.seed, row.lr, round(row.minutes, 6))

    def __str__(self) -> str:
        rate = "" if self.lr is None else f", rate {self.lr:g}"
        return f"{self.stage}, {self.data}, seed {self.seed}: {self.name}{rate}, {self.minutes:g} min"


def execute(plan: RunPlan, steps: int) -> Watched:
    """Run the command of `plan` for `steps` steps, with caches of its own that are removed afterwards. Raises
    ValueError if it fails."""
    shutil.rmtree(plan.folder, ignore_errors=True)
    plan.folder.mkdir(parents=True)
    caches = {"MINIMIND_CACHE": "cache", "TORCHINDUCTOR_CACHE_DIR": "compiled", "HF_HOME": "datasets"}
    env = os.environ | {name: str(plan.folder / folder) for name, folder in caches.items()}
    log = plan.folder / "log.txt"
    if plan.name == "upstream":
        watched = run_upstream(plan, steps, log, env)
    else:
        command = ours(plan, steps) if plan.is_ours else recipe(plan, steps)
        watched = watch(command, plan.metrics, log, env, ROOT)
    for folder in caches.values():
        shutil.rmtree(plan.folder / folder, ignore_errors=True)
    return watched


def step_tokens(plan: RunPlan) -> int:
    """Positions of a step, of ours and of transformers."""
    gpu = choose_device(plan.device).type == "cuda"
    return GPU_BATCH if gpu and plan.preset != "nano" else STEP


def ours(plan: RunPlan, steps: int) -> list[str]:
    """The command of a stage's script."""
    train, heldout = map(str, plan.parts)
    flags: dict[str, Any] = {
        "data": train, "heldout-data": heldout, "tokens": steps * step_tokens(plan), "seed": plan.seed,
        "evals": plan.evals, "eval-tokens": 1 << 40, "device": plan.device, "out": plan.weights,
        "keep-checkpoints": 1,
    }  # fmt: skip
    flags |= {"preset": plan.preset} if plan.init is None else {"from": plan.init, "eval-questions": plan.questions}
    flags |= {"log-every": 1} if steps == PROBE else {}
    command = [sys.executable, f"train/{plan.stage}.py"]
    command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return [*command, *(["--compile"] if plan.name == "ours" else [])]


def recipe(plan: RunPlan, steps: int) -> list[str]:
    """The command of bench/training/recipes.py."""
    padded = plan.name == "upstream-style"
    rows, seq_len, accumulation = plan.rows, PADDED, plan.accumulation
    if not padded:
        rows, seq_len = min(GPU_BATCH, step_tokens(plan)) // 512, 512
    assert plan.lr is not None
    setting = RecipeSetting(
        recipe="upstream-style" if padded else "hf", stage=plan.stage, preset=plan.preset, data=str(plan.parts[0]),
        heldout=str(plan.parts[1]), out=str(plan.folder), lr=plan.lr, steps=steps, seed=plan.seed, rows=rows,
        seq_len=seq_len, accumulation=accumulation if padded else 1, evals=plan.evals, questions=plan.questions,
        tokenizer=str(Path(plan.upstream) / "model") if padded and plan.upstream else None,
        init=None if plan.init is None else str(plan.init), device=plan.device, compile=plan.name == "hf",
    )  # fmt: skip
    setting.write(plan.folder / "setting.json")
    return [sys.executable, "bench/training/recipes.py", str(plan.folder / "setting.json")]


@dataclass(frozen=True)
class Speed:
    """startup: seconds of a command outside its steps, compilation included; step: seconds of a step."""

    startup: float
    step: float

    def steps_in(self, seconds: float) -> int:
        """Steps of a run that takes `seconds`, at least two."""
        return max(2, int((seconds - self.startup) / self.step))

    @staticmethod
    def measure(plan: RunPlan) -> Speed:
        """Measure the speed of the implementation of `plan` in a run of a few steps."""
        probe = replace(plan, evals=1, questions=min(plan.questions, 1), minutes=0.0)
        watched = execute(probe, PROBE)
        if plan.name == "upstream":
            places = [(point.seconds, point.tokens) for point in watched.points]
        else:
            rows = [row for row in read_metrics(probe.metrics) if row["kind"] == "train"]
            places = [(row["time"]["seconds"], row["tokens"]) for row in rows]
        shutil.rmtree(probe.folder)
        steps = [
            (after - before) * (step_tokens(plan) / (end - begin) if plan.is_ours else 1)
            for (before, begin), (after, end) in pairwise(places[1:])
        ]
        usual = statistics.median(steps)  # a step with a compilation takes far longer, one of all layers a few times
        step = statistics.mean(seconds for seconds in steps if seconds < COMPILED * usual)
        return Speed(watched.points[-1].seconds - PROBE * step, step)


def run_upstream(plan: RunPlan, steps: int, log: Path, env: dict[str, str]) -> Watched:
    """Run upstream's own pretraining. It saves after a quarter of the steps each time (in a run that measures the speed
    after each), which its time includes."""
    assert plan.upstream is not None and plan.lr is not None
    copy = plan.folder / "upstream"
    for part in ("model", "trainer", "dataset"):
        shutil.copytree(Path(plan.upstream) / part, copy / part, ignore=shutil.ignore_patterns("*.jsonl"))
    config = ModelConfig.preset(plan.preset)
    interval = plan.accumulation * (1 if steps == PROBE else math.ceil(steps / SAVES))
    rows = plan.parts[0].read_text(encoding="utf-8").splitlines()
    needed = steps * plan.rows * plan.accumulation
    epochs = math.ceil(needed / len(rows))
    data = plan.folder / "rows.jsonl"
    _write(data, random.Random(plan.seed).sample(rows, min(len(rows), math.ceil(needed / epochs))))
    flags: dict[str, Any] = {
        "epochs": epochs, "batch_size": plan.rows, "accumulation_steps": plan.accumulation, "learning_rate": plan.lr,
        "hidden_size": config.hidden_size, "num_hidden_layers": config.num_hidden_layers, "max_seq_len": PADDED + 1,
        "data_path": data, "save_interval": interval, "log_interval": interval, "use_moe": int(config.num_experts > 0),
        "save_dir": "../out",
    }  # fmt: skip
    command = [plan.python, "train_pretrain.py"]
    command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    saves = _Saves(copy, plan.folder, log)
    run_and_poll(command, log, env | {"PYTHONUNBUFFERED": "1"}, copy / "trainer", saves.look)
    return _evaluated(plan, saves)


class _Saves:
    """The weights that upstream's trainer saves, copied as they appear: (file, batches so far, seconds since its
    start)."""

    def __init__(self, copy: Path, folder: Path, log: Path) -> None:
        self.copy, self.folder, self.log = copy, folder, log
        self.saved: list[tuple[Path, int, float]] = []
        self._newest = 0

    def look(self, elapsed: float) -> None:
        """The resume file is put in place after the weights are complete."""
        resume = next(self.copy.glob("checkpoints/pretrain_*_resume.pth"), None)
        if resume is None or (changed := resume.stat().st_mtime_ns) == self._newest:
            return
        self._newest = changed
        kept = self.folder / f"save-{len(self.saved) + 1}.pth"
        shutil.copyfile(resume.with_name(resume.name.replace("_resume", "")), kept)
        epochs = _LOGGED.findall(self.log.read_text(encoding="utf-8"))  # a line is logged before each save
        self.saved.append((kept, sum(int(done) for done in dict(epochs).values()), elapsed))


def _evaluated(plan: RunPlan, saves: _Saves) -> Watched:
    """Points of the saved weights, evaluated now with upstream's tokenizer."""
    assert plan.upstream is not None
    tokenizer = load_tokenizer(Path(plan.upstream) / "model")
    heldout = open_data("pretrain", str(plan.parts[1]), tokenizer)
    points: list[CurvePoint] = []
    for file, batches, seconds in saves.saved:
        tokens = batches * plan.rows * PADDED
        model = load_model(file, upstream_config(file, plan.preset)).to(choose_device(plan.device))
        points.append(point_of({"tokens": tokens, **heldout_figures(model, heldout, tokenizer, 0)}, seconds))
        file.unlink()
    if not points:
        raise ValueError(f"{plan.folder}: upstream's trainer saved no weights that this version finds")
    return Watched(points, 0.0)


def upstream_config(file: Path, preset: str) -> ModelConfig:
    """The shape of upstream's weights, whose versions differ in heads, feed-forward size and QK-norm."""
    import torch

    state = torch.load(file, map_location="meta", weights_only=True)
    layer = "model.layers.0."
    q, k = (state[f"{layer}self_attn.{name}_proj.weight"].shape[0] for name in "qk")
    vocab_size, hidden = state["model.embed_tokens.weight"].shape
    return ModelConfig.preset(
        preset, vocab_size=vocab_size, hidden_size=hidden, num_attention_heads=UPSTREAM_HEADS,
        head_dim=q // UPSTREAM_HEADS, num_key_value_heads=k * UPSTREAM_HEADS // q,
        intermediate_size=state[f"{layer}mlp.gate_proj.weight"].shape[0],
        qk_norm=f"{layer}self_attn.q_norm.weight" in state,
    )  # fmt: skip
