"""One form of our operators in a process of its own, for bench/host_time.py: it is chosen when they are imported."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from bench.compilation import host_stub

TOKENS = 64
SHRINK = 8  # of the presets' widths: no kernel runs, and memory that nobody writes costs time too
CALLS = (1, 9)  # of an op in the two graphs of which the difference is taken
Case = Callable[[], tuple[float, float]]  # -> seconds of the host in one forward and one backward


def work(visible: bool, arch: int, pipe: Connection) -> None:
    """Told the name of a case and how often to run it: answers with what `_timed` gives, first what the case launches.
    Told None, ends."""
    host_stub.import_ops(visible)
    torch.set_num_threads(1)
    with host_stub.stubbed(arch) as found:
        cases: dict[str, Case] = {}
        while (told := pipe.recv()) is not None:
            name, runs = told
            if name not in cases:
                cases[name] = _make(name)
                cases[name]()  # compiles
                found.launches = 0
                cases[name]()
                pipe.send(found.launches)
            else:
                pipe.send(_timed(cases[name], runs))


def _timed(case: Case, runs: int) -> list[tuple[float, float]]:
    gc.collect()
    gc.disable()
    try:
        return [case() for _ in range(runs)]
    finally:
        gc.enable()


def _make(name: str) -> Case:
    """A preset's whole model, or `OP PRESET CALLS`. What was compiled before is forgotten."""
    from minimind.config import PRESETS

    torch.compiler.reset()
    if name in PRESETS:
        return _model(PRESETS[name])
    op, preset, calls = name.split()
    return _op(op, PRESETS[preset], int(calls))


def _small(config: Any) -> Any:
    """As deep, with as many heads and experts."""
    widths = ("hidden_size", "head_dim", "intermediate_size", "moe_intermediate_size")
    return replace(config, vocab_size=64, **{name: getattr(config, name) // SHRINK for name in widths})


def _model(config: Any) -> Case:
    from minimind import ops
    from minimind.modeling import Model

    model = Model(_small(config))
    model.compute_dtype = torch.bfloat16
    ids = torch.zeros(1, TOKENS, dtype=torch.int64)
    bounds = torch.tensor([0, TOKENS // 3, TOKENS], dtype=torch.int32)
    mask = torch.ones(1, TOKENS, dtype=torch.bool)
    compiled = torch.compile(model, fullgraph=True, dynamic=False)

    def forward() -> list[Tensor]:
        with ops.using("kernels"):
            out = compiled(ids, cu_seqlens=bounds, attention_mask=mask, return_logits=False)
        return [out.hidden_states, out.aux_loss]

    return _both_ways(forward, model.zero_grad)


def _op(op: str, config: Any, calls: int) -> Case:
    function, leaves = _ops(_small(config))[op]
    inputs = [leaves() for _ in range(calls)]
    compiled = torch.compile(
        lambda sets: [out for given in sets for out in function(*given)], fullgraph=True, dynamic=False
    )

    def clear() -> None:
        for given in inputs:
            for leaf in given:
                leaf.grad = None

    return _both_ways(lambda: compiled(inputs), clear)


def _both_ways(forward: Callable[[], list[Tensor]], clear: Callable[[], Any]) -> Case:
    seeds: list[Tensor] = []

    def run() -> tuple[float, float]:
        start = time.perf_counter()
        outputs = [out for out in forward() if out.requires_grad]
        middle = time.perf_counter()
        if not seeds:
            seeds.extend(torch.ones_like(out) for out in outputs)
        backward = time.perf_counter()
        torch.autograd.backward(outputs, seeds)
        end = time.perf_counter()
        clear()
        return middle - start, end - backward

    return run


def _ops(config: Any) -> dict[str, tuple[Callable[..., tuple[Tensor, ...]], Callable[[], list[Tensor]]]]:
    """Name -> (the op, what makes its inputs)."""
    from minimind.kernels.moe_experts import moe_experts
    from minimind.kernels.moe_routing import route
    from minimind.kernels.rms_norm import add_rms_norm, rms_norm
    from minimind.kernels.rope import rope
    from minimind.kernels.swiglu import swiglu

    size, dim, inter = config.hidden_size, config.head_dim, config.intermediate_size
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    experts, top_k = config.num_experts or 4, config.num_experts_per_tok or 2
    gain = torch.ones(size)
    tables = torch.rand(2, TOKENS, dim // 2)
    positions = torch.arange(TOKENS).unsqueeze(0)
    order = torch.arange(TOKENS * top_k, dtype=torch.int32)
    offsets = torch.linspace(0, TOKENS * top_k, experts + 1).int()

    def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.rand(shape, dtype=dtype).requires_grad_()

    def hidden() -> Tensor:
        return leaf(1, TOKENS, size)

    def routed(logits: Tensor) -> tuple[Tensor, ...]:
        found = route(logits, top_k, True)
        return found.gates, found.scores

    def mixed(*given: Tensor) -> tuple[Tensor, ...]:
        return (moe_experts(*given, order, offsets),)

    return {
        "rms_norm": (lambda x: (rms_norm(x, gain, 1e-5),), lambda: [hidden()]),
        "add_rms_norm": (lambda x, y: add_rms_norm(x, y, gain, 1e-5), lambda: [hidden(), hidden()]),
        "rope": (
            lambda qkv: rope(qkv, *tables, positions, heads, groups),
            lambda: [leaf(1, TOKENS, (heads + 2 * groups) * dim)],
        ),
        "swiglu": (lambda x: (swiglu(x),), lambda: [leaf(1, TOKENS, 2 * inter)]),
        "moe_route": (routed, lambda: [leaf(TOKENS, experts, dtype=torch.float32)]),
        "moe_experts": (
            mixed,
            lambda: [
                leaf(TOKENS, size),
                leaf(experts, 2 * inter, size),
                leaf(experts, size, inter),
                leaf(TOKENS, top_k),
            ],
        ),
    }


OPS = ("rms_norm", "add_rms_norm", "rope", "swiglu", "moe_route", "moe_experts")


class HostWorker:
    """That process, as this one sees it."""

    def __init__(self, visible: bool, arch: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(visible, arch, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, name: str, runs: int) -> Any:
        """Launches of our kernels in one forward and backward, the first time; then seconds of (forward, backward)."""
        self.pipe.send((name, runs))
        try:
            return self.pipe.recv()
        except EOFError:
            raise ValueError(f"{name}: its process died; see above") from None

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it may have died
            self.pipe.send(None)
        self.process.join(timeout=20)
        self.process.kill()
        self.process.join()


@contextlib.contextmanager
def workers(arch: int) -> Iterator[dict[str, HostWorker]]:
    """operator: torch.compile calls our operators; launch: it looks into them."""
    found = {"operator": HostWorker(False, arch), "launch": HostWorker(True, arch)}
    try:
        yield found
    finally:
        for worker in found.values():
            worker.close()
