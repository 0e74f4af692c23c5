"""The shapes that one run asks the kernels for: prompts and rows of every length, decoding batches, training.

A kernel is compiled once for each of its variants: constants, dtypes, and which integers are 1 or multiples of 16 and
which addresses are aligned. A run on a card waits for every one of them, so their number must not follow the lengths.
bench/compilation/capture.py watches these cases, bench/resources.py compiles and counts what they ask for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from bench.compilation.capture import Compilation
from minimind import ops
from minimind.config import PRESETS, ModelConfig
from minimind.inference.batch import DecodeBatch
from minimind.inference.cache import PagedCache
from minimind.inference.replica import Replica
from minimind.inference.requests import SamplingParams
from minimind.inference.runner import Runner
from minimind.inference.scheduler import Chunk, SequenceState
from minimind.modeling import Model
from minimind.objectives.next_token import TokenBatch, next_token_loss

CPU = torch.device("cpu")
PAGE = 16
DENSE = replace(PRESETS["nano"], num_hidden_layers=2)
MIXTURE = replace(
    DENSE,
    num_experts=4,
    num_experts_per_tok=2,
    num_shared_experts=1,
    moe_intermediate_size=512,
    router_aux_loss_coef=0.1,
)


@dataclass(frozen=True)
class Lengths:
    """prompts: tokens of a prefill step. rows: of answers, which are learnt from. batches: samples decoded at once."""

    prompts: Sequence[int]
    rows: Sequence[int]
    batches: Sequence[int]


FEW = Lengths(prompts=(1, 7, 16, 100), rows=(128, 200), batches=(1, 3, 16))
MANY = Lengths(
    prompts=(*range(1, 34), 64, 65, 127, 128, 255, 256, 400, 512, 513, 599, 600),
    rows=(128, 129, 200, 333, 512, 1000, 1024),
    batches=(*range(1, 18), 31, 32, 64),
)


def cases(dtype: torch.dtype, lengths: Lengths = FEW) -> dict[str, Callable[[], None]]:
    """Name, which begins with "run, " -> a part of a run with activations of `dtype`."""
    found: dict[str, Callable[[], None]] = {}
    for name, config in (("dense", DENSE), ("experts", MIXTURE)):
        found |= _cases_of(name, config, dtype, lengths)
    return found


def _cases_of(name: str, config: ModelConfig, dtype: torch.dtype, lengths: Lengths) -> dict[str, Callable[[], None]]:
    def prefill() -> None:
        runner = _runner(config, dtype, max(lengths.prompts), 1)
        for length in lengths.prompts:
            sample = _sample(length)
            half = length // 2
            with torch.no_grad():
                runner.prefill([Chunk(sample, 0, length, True)])
                if half:
                    runner.prefill([Chunk(sample, 0, half, False)])
                    runner.prefill([Chunk(sample, half, length, True)])

    def decoding() -> None:
        runner = _runner(config, dtype, PAGE, max(lengths.batches))
        for _ in range(max(lengths.batches)):
            runner._batch.join(_sample(3), SamplingParams(), seed=0)
        for rows in lengths.batches:
            with torch.no_grad():
                runner._decode_layers(rows)

    def answers() -> None:
        model = _model(config, dtype)
        for length in lengths.rows:
            for rows in (1, 2):
                _policy_step(model, rows, length)
                _teacher_step(model, rows, length)

    def training() -> None:
        model = _model(config, dtype)
        for rows, documents in ((1, 1), (2, 2), (2, 5), (3, 17)):
            _training_step(model, rows, documents)

    parts = {"prefill": prefill, "decoding": decoding, "answers": answers, "training": training}
    return {f"run, {name}, {part}": _with_kernels(run) for part, run in parts.items()}


def variants(compilations: Sequence[Compilation]) -> dict[str, int]:
    """Of the compilations of `cases`, how many variants of each kernel a run has on one card in one dtype."""
    of_a_run = (c for c in compilations if c.case.startswith("run, "))
    counts = Counter((c.kernel.lstrip("_"), c.arch, c.dtype) for c in of_a_run)
    return {name: max(n for key, n in counts.items() if key[0] == name) for name, _, _ in sorted(counts)}


def _with_kernels(run: Callable[[], None]) -> Callable[[], None]:
    def inside() -> None:
        with ops.using("kernels"):
            run()

    return inside


def _model(config: ModelConfig, dtype: torch.dtype) -> Model:
    model = Model(config)
    model.compute_dtype = dtype
    return model


def _runner(config: ModelConfig, dtype: torch.dtype, context: int, rows: int) -> Runner:
    pages = -(-context // PAGE) + 1
    cache = PagedCache.allocate(config, pages, PAGE, dtype, CPU)
    batch = DecodeBatch(rows, pages, PAGE, config.vocab_size, CPU)
    return Runner(Replica(_model(config, dtype), dtype), cache, batch, context + 1, "reference")


def _sample(length: int) -> SequenceState:
    sample = SequenceState(0, 0, 1, list(range(length)))
    sample.pages = list(range(-(-length // PAGE)))
    sample.computed = length - 1
    return sample


def _policy_step(model: Model, rows: int, length: int) -> None:
    """Log-probabilities and entropy of the second half of every row, and their gradient."""
    ids = torch.zeros(rows, length, dtype=torch.int64)
    targets = ids.clone()
    targets[:, : length // 2] = -100
    bounds = torch.arange(rows + 1, dtype=torch.int32) * length
    for entropy in (False, True):
        out = model(ids, cu_seqlens=bounds, attention_mask=torch.ones_like(ids), return_logits=False)
        hidden = out.hidden_states.flatten(0, 1)
        found = ops.linear_log_probs(
            hidden, model.head_weight, targets.flatten(), entropy=entropy, num_targets=rows * (length - length // 2)
        )
        (sum(part.sum() for part in found if part is not None) + out.aux_loss).backward()


def _teacher_step(model: Model, rows: int, length: int) -> None:
    hidden = torch.zeros(rows * length, model.config.hidden_size, dtype=model.compute_dtype, requires_grad=True)
    ops.linear_distillation(hidden, model.head_weight, hidden.detach(), model.head_weight.detach()).backward()


def _training_step(model: Model, rows: int, documents: int) -> None:
    length = 256
    ids = torch.zeros(rows, length, dtype=torch.int64)
    inside = torch.linspace(0, rows * length, documents + 1).int()
    bounds = torch.cat((inside, torch.arange(rows + 1, dtype=torch.int32) * length)).unique()
    loss, aux, *_ = next_token_loss(model, TokenBatch(ids, ids, bounds, ids.numel()))
    (loss + aux).backward()
    with torch.no_grad():
        next_token_loss(model, TokenBatch(ids, ids, bounds, ids.numel()))
