"""Run every Triton op once, forward and backward, on few tokens, and check its results; nothing is timed.

    compute-sanitizer --tool memcheck python bench/kernel_check.py [--ops rope moe] [--device auto]
    TRITON_INTERPRET=1 python bench/kernel_check.py --device cpu        # in Triton's interpreter

Short enough to run under compute-sanitizer, as bench/card.py does. The exit status is 1 if an error is larger than the
numerics contract allows (bench/operators/parity.py). tests/kernels tests the ops more thoroughly.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # `bench`, and no `kernels` for transformers to find

import torch

from bench.common.command import check_choices, run
from bench.operators.cases import BUILDERS, Case, applies, build
from bench.operators.parity import ALLOWED, worst_ratio
from minimind.config import PRESETS
from minimind.kernels.triton_support import why_no_triton
from minimind.utils.device import choose_device, choose_precision

TOKENS = 77  # no multiple of any tile


@dataclass(frozen=True)
class Args:
    """Check every op's kernels."""

    ops: tuple[str, ...] = tuple(BUILDERS)
    """Ops to check."""
    device: str = "auto"
    """Device: cpu, cuda, or auto, which takes a GPU if there is one."""


def cases(args: Args, device: torch.device) -> Iterator[Case]:
    """Every different shape among the presets; in float32 on a CPU, since the interpreter does not round to bf16."""
    dtype = choose_precision(device).compute_dtype if device.type == "cuda" else torch.float32
    for op in args.ops:
        seen = set()
        for preset, config in PRESETS.items():
            if preset == "nano" or not applies(op, config):
                continue
            case = build(op, preset, TOKENS, dtype, device, compiled=False, kernels=True)
            if case.shape not in seen:
                seen.add(case.shape)
                yield case


def main(args: Args) -> int:
    """The exit status."""
    device = choose_device(args.device)
    check_choices("ops", args.ops, BUILDERS)
    if (reason := why_no_triton(device)) is not None:
        raise ValueError(f"--device {device}: {reason}; on a CPU set TRITON_INTERPRET=1")
    wrong = 0
    for case in cases(args, device):
        ratio = worst_ratio(case.implementations["minimind"], case.reference, case.leaves)
        wrong += ratio > ALLOWED
        verdict = "" if ratio <= ALLOWED else f", and {ALLOWED:g} is allowed"
        print(f"{case.op}, {case.shape}: error {ratio:.2g} times plain PyTorch's{verdict}", flush=True)
    print(f"{wrong} wrong results")
    return 1 if wrong else 0


if __name__ == "__main__":
    run(main, Args, __doc__)
