"""Parts of whole runs, with the shapes that they give to kernels: prompts, decoding batches, answers, training.

Triton compiles a kernel once for each variant: its constants, dtypes, which integers are 1 or multiples of 16, and
which addresses are aligned. A run on a GPU waits for each of these compilations, so their number must not depend on
lengths. bench/resources.py compiles and counts them.
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
from minimind.inference.decode.kv_cache import PagedCache
from minimind.inference.requests import SamplingParams
from minimind.inference.runner import Replica, Runner
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
    """prompts: lengths of prompts in a prefill step. rows: lengths of rows with an answer to train on. batches: numbers
    of sequences decoded at once."""

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
    """{name: a part of a run with activations of `dtype`}; every name begins with "run, "."""
    parts: dict[str, Callable[[], None]] = {}
    for name, config in (("dense", DENSE), ("experts", MIXTURE)):
        parts |= _cases_of(name, config, dtype, lengths)
    return parts


def _cases_of(name: str, config: ModelConfig, dtype: torch.dtype, lengths: Lengths) -> dict[str, Callable[[], None]]:
    def prefill() -> None:
        runner = _runner(config, dtype, max(lengths.prompts), 1)
        for length in lengths.prompts:
            sequence = _sequence(length)
            half = length // 2
            with torch.no_grad():
                runner.prefill([Chunk(sequence, 0, length, True)])
                if half:
                    runner.prefill([Chunk(sequence, 0, half, False)])
                    runner.prefill([Chunk(sequence, half, length, True)])

    def decoding() -> None:
        runner = _runner(config, dtype, PAGE, max(lengths.batches))
        for _ in range(max(lengths.batches)):
            runner._batch.join(_sequence(3), SamplingParams(), seed=0)
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
    """Kernel -> the number of its variants that a run compiles on one GPU in one dtype."""
    run_compilations = (c for c in compilations if c.case.startswith("run, "))
    counts = Counter((c.kernel.lstrip("_"), c.arch, c.dtype) for c in run_compilations)
    return {name: max(n for key, n in counts.items() if key[0] == name) for name, _, _ in sorted(counts)}


def _with_kernels(run: Callable[[], None]) -> Callable[[], None]:
    def with_kernels() -> None:
        with ops.using("kernels"):
            run()

    return with_kernels


def _model(config: ModelConfig, dtype: torch.dtype) -> Model:
    model = Model(config)
    model.compute_dtype = dtype
    return model


def _runner(config: ModelConfig, dtype: torch.dtype, context: int, rows: int) -> Runner:
    pages = -(-context // PAGE) + 1
    cache = PagedCache.allocate(config, pages, PAGE, dtype, CPU)
    batch = DecodeBatch(rows, pages, PAGE, config.vocab_size, CPU)
    return Runner(Replica(_model(config, dtype), dtype), cache, batch, context + 1, "reference")


def _sequence(length: int) -> SequenceState:
    sequence = SequenceState(0, 0, 1, list(range(length)))
    sequence.pages = list(range(-(-length // PAGE)))
    sequence.computed = length - 1
    return sequence


def _policy_step(model: Model, rows: int, length: int) -> None:
    """Log-probabilities and entropy of the second half of every row, and their gradient."""
    ids = torch.zeros(rows, length, dtype=torch.int64)
    targets = ids.clone()
    targets[:, : length // 2] = -100
    bounds = torch.arange(rows + 1, dtype=torch.int32) * length
    for entropy in (False, True):
        out = model(ids, cu_seqlens=bounds, attention_mask=torch.ones_like(ids), return_logits=False)
        hidden = out.hidden_states.flatten(0, 1)
        outputs = ops.linear_log_probs(
            hidden, model.head_weight, targets.flatten(), entropy=entropy, num_targets=rows * (length - length // 2)
        )
        (sum(part.sum() for part in outputs if part is not None) + out.aux_loss).backward()


def _teacher_step(model: Model, rows: int, length: int) -> None:
    hidden = torch.zeros(rows * length, model.config.hidden_size, dtype=model.compute_dtype, requires_grad=True)
    ops.linear_distillation(hidden, model.head_weight, hidden.detach(), model.head_weight.detach()).backward()


def _training_step(model: Model, rows: int, documents: int) -> None:
    length = 256
    ids = torch.zeros(rows, length, dtype=torch.int64)
    document_bounds = torch.linspace(0, rows * length, documents + 1).int()
    bounds = torch.cat((document_bounds, torch.arange(rows + 1, dtype=torch.int32) * length)).unique()
    loss, aux, *_ = next_token_loss(model, TokenBatch(ids, ids, bounds, ids.numel()))
    (loss + aux).backward()
    with torch.no_grad():
        next_token_loss(model, TokenBatch(ids, ids, bounds, ids.numel()))
