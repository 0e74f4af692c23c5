"""How many programs of a kernel fit a multiprocessor at once, and which resource limits their number.

The limits are from the CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; the rounding is
that of CUDA's cuda_occupancy.h.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
REGISTERS = 64 * KIB  # of a multiprocessor, in four parts
RESERVED = 1 * KIB  # bytes of shared memory that CUDA takes for each program


@dataclass(frozen=True)
class SMLimits:
    """Warps, programs and bytes of shared memory of a multiprocessor, and the shared memory that one program can
    get."""

    warps: int
    programs: int
    shared: int
    shared_per_program: int


CARDS = {
    70: SMLimits(warps=64, programs=32, shared=96 * KIB, shared_per_program=96 * KIB),
    75: SMLimits(warps=32, programs=16, shared=64 * KIB, shared_per_program=64 * KIB),
    80: SMLimits(warps=64, programs=32, shared=164 * KIB, shared_per_program=163 * KIB),
    86: SMLimits(warps=48, programs=16, shared=100 * KIB, shared_per_program=99 * KIB),
    89: SMLimits(warps=48, programs=24, shared=100 * KIB, shared_per_program=99 * KIB),
    90: SMLimits(warps=64, programs=32, shared=228 * KIB, shared_per_program=227 * KIB),
    120: SMLimits(warps=48, programs=24, shared=100 * KIB, shared_per_program=99 * KIB),
}


@dataclass(frozen=True)
class Occupancy:
    """programs: on a multiprocessor at once. share: of its warps that they fill. bound: the limits that they reach."""

    programs: int
    share: float
    bound: str


def occupancy(arch: int, warps: int, registers: int, shared: int) -> Occupancy:
    """warps: of a program. registers: of a thread. shared: bytes of shared memory that a program requests."""
    card = CARDS[arch]
    per_warp = _round_up(max(registers, 1) * 32, 256)
    limits = {
        "warps": card.warps // warps,
        "programs": card.programs,
        "registers": REGISTERS // 4 // per_warp * 4 // warps,
        "shared": card.shared // _round_up(shared + RESERVED, 128),
    }
    programs = min(limits.values())
    bound = ", ".join(name for name, limit in limits.items() if limit == programs)
    return Occupancy(programs, programs * warps / card.warps, bound)


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step
