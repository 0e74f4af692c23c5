"""One training run of bench/transfer.py: its settings, its training, and its row in transfer.jsonl."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from bench.common.record import columns_of, now
from minimind.config import ModelConfig
from minimind.data import PackedLoader, builtin_conversations
from minimind.modeling import Model
from minimind.objectives.next_token import next_token_loss
from minimind.tokenization import ChatEncoder
from minimind.training.arguments import StageArgs
from minimind.training.data_split import DataSplit, NamedFiles, open_split, read_texts
from minimind.training.evaluation import describe_batch, heldout_loss
from minimind.training.initial_model import InitialModel
from minimind.training.job import Job
from minimind.training.optim import OptimizerName
from minimind.training.stages.chats import ChatArgs, open_chats
from minimind.training.trainer import NonFiniteLossError, Stage
from minimind.utils.device import choose_device, choose_precision

StageName = Literal["pretrain", "sft"]
HELDOUT = 32_768  # held-out tokens, the same for all runs of a corpus
BASE_RATE = 4e-3  # peak rate of the pretraining before SFT


@dataclass(frozen=True)
class Point:
    """The settings of a run, except its peak rate. tokens: of the run; batch_tokens: of a step; embedding: the
    embedding's rate as a multiple of the others'; warmup: share of the steps; preset: a shape outside the family, or
    ""."""

    corpus: str
    width: int
    depth: int
    tokens: int
    batch_tokens: int = 4096
    optimizer: OptimizerName = "muon"
    stage: StageName = "pretrain"
    seed: int = 1
    embedding: float = 1.0
    warmup: float = 0.02
    preset: str = ""

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.preset(self.preset) if self.preset else family(self.width, self.depth)

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / self.batch_tokens)

    @property
    def name(self) -> str:
        """A name for the run's folder."""
        return "-".join(str(value) for value in dataclasses.astuple(self) if value != "")

    def __str__(self) -> str:
        shape = self.preset or f"width {self.width} depth {self.depth}"
        usual = {"seed": 1, "embedding": 1.0, "warmup": 0.02}
        more = [f"{key} {getattr(self, key):g}" for key, value in usual.items() if getattr(self, key) != value]
        return ", ".join(
            [f"{self.stage} {self.optimizer}", self.corpus, shape, f"{self.tokens:,} tokens",
             f"{self.batch_tokens:,} a step", *more]
        )  # fmt: skip

    @property
    def flops(self) -> float:
        """Floating-point operations of the run."""
        return _flops_per_token(self.config) * self.tokens


@dataclass(frozen=True)
class TransferRow:
    """A finished run. heldout_loss: nats per token, None if the loss diverged. seconds: since its last start, on a
    machine that may have done other work as well."""

    point: Point
    rate: float
    heldout_loss: float | None
    heldout_bpb: float | None
    heldout_tokens: int
    steps: int
    seconds: float
    about: dict[str, Any] = dataclasses.field(default_factory=dict)  # date, commit, device, torch, precision

    @property
    def loss(self) -> float:
        return math.inf if self.heldout_loss is None else self.heldout_loss


def family(width: int, depth: int) -> ModelConfig:
    """A shape of nano's family: heads of 32, two key/value heads, normalised queries and keys."""
    if width % 64:
        raise ValueError(f"--widths {width}: must be a multiple of 64, two heads of 32")
    return ModelConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=width // 32,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=64 * math.ceil(width * 8 / 3 / 64),
        qk_norm=True,
        max_position_embeddings=4096,
    )


@cache
def _flops_per_token(config: ModelConfig) -> int:
    with torch.device("meta"):
        return Model(config).flops_per_token(512)


def train(point: Point, rate: float, data: str, work: Path) -> TransferRow:
    """Train the run to its end; an interrupted one continues from its last checkpoint under `work`. Raises
    KeyboardInterrupt if it is stopped."""
    folder = work / f"{point.name}-{rate:g}"
    base = _base(point, data, work) if point.stage == "sft" else None
    started = time.perf_counter()
    try:
        figures = _fit(point, rate, data, folder, base)
    except NonFiniteLossError:
        figures = {"heldout_loss": None, "heldout_bpb": None, "heldout_tokens": 0}
    seconds = round(time.perf_counter() - started, 1)
    start = json.loads((folder / "versions.json").read_text(encoding="utf-8"))["starts"][-1]
    shutil.rmtree(folder)
    about = {
        "date": now(),
        "commit": start["commit"],
        "device": start["device"].partition(";")[0],
        "torch": start["torch"],
        "precision": choose_precision(choose_device("auto")).name,
    }
    steps = math.ceil(point.tokens / point.batch_tokens)
    named = {key: figures[key] for key in ("heldout_loss", "heldout_bpb", "heldout_tokens")}
    return TransferRow(point, rate, **named, steps=steps, seconds=seconds, about=about)


def _base(point: Point, data: str, work: Path) -> Path:
    """The folder of the pretrained model from which SFT of `point` starts."""
    base = Point("builtin", point.width, point.depth, point.tokens)
    folder = work / f"base-{base.name}"
    if not (folder / "finished").exists():
        _fit(base, BASE_RATE, data, folder, None)
    return folder


def _fit(point: Point, rate: float, data: str, folder: Path, base: Path | None) -> dict[str, Any]:
    """Train in `folder`; the held-out figures at the end."""
    job = Job.begin(point.stage, _args(point, rate, data, folder, base), Console(quiet=True))
    if base is None:
        config = dataclasses.replace(point.config, vocab_size=job.tokenizer.vocab_size)
        job.initial = InitialModel(job.tokenizer, config, point.preset or "family")
    parts = _open(job, point)
    plan = job.plan(partial(PackedLoader, parts.train, job.args.row, seed=point.seed))
    job.open_run()
    model, trained = job.build_model()
    figures: dict[str, Any] = {}

    def evaluate(final: bool) -> dict[str, Any]:
        if final:
            figures.update(heldout_loss(model, parts.heldout, job.args.row, HELDOUT, job.parallel))
        return figures

    stage = Stage(
        loss=lambda batch: next_token_loss(trained, batch),
        evaluate=evaluate,
        sample=lambda: "",
        describe=lambda batch: describe_batch(batch, parts.train, job.tokenizer),
        data_fingerprint=parts.fingerprint,
        peak_lr=rate,
    )
    if not job.fit(plan, model, stage):
        raise KeyboardInterrupt
    return figures


def _args(point: Point, rate: float, data: str, folder: Path, base: Path | None) -> StageArgs:
    steps = math.ceil(point.tokens / point.batch_tokens)
    kind = StageArgs if base is None else ChatArgs
    return kind(
        from_=None if base is None else str(base), data=(data,) if base is None else (), tokens=point.tokens,
        batch_tokens=point.batch_tokens, micro_tokens=min(4096, point.batch_tokens), optimizer=point.optimizer,
        lr=rate, warmup=point.warmup, embedding_lr=point.embedding, seed=point.seed, seq_len=512, evals=1,
        save_every=math.ceil(steps / 2), keep_checkpoints=1, out=str(folder),
    )  # fmt: skip


def _open(job: Job, point: Point) -> DataSplit:
    if point.stage == "sft":
        return open_chats(job, (), (), ChatEncoder(job.tokenizer), builtin_conversations())
    return open_split(job, NamedFiles.from_flags(job.args.data, ()), partial(read_texts, job))


def write(path: Path, row: TransferRow) -> None:
    """Add a row to the end of the file."""
    values = dataclasses.asdict(row)
    line = {**values.pop("about"), **values.pop("point"), **values}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read(path: Path) -> list[TransferRow]:
    """The rows of a file; none if it does not exist. Raises ValueError if `write` did not write it."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(_row(json.loads(line)))
        except (ValueError, TypeError) as problem:
            raise ValueError(
                f"{path}:{number}: not a row of this version ({problem}); name another folder with --out"
            ) from None
    return rows


def _row(values: dict[str, Any]) -> TransferRow:
    point = Point(**{key: values.pop(key) for key in columns_of(Point) if key in values})
    fields = {key: values.pop(key) for key in columns_of(TransferRow) if key in values}
    return TransferRow(point=point, about=values, **fields)
