"""Everything that a GPU is asked, in one command that can be cut off and run again until it is done.

    python bench/campaign.py [--minutes 25] [--only kernels throughput] [--data FILE...]

The campaign is a list of slices, each a command of its own that takes less than eight minutes: parity of every kernel,
the same under compute-sanitizer, the kernels' resources, every op against its peers, and training throughput of every
preset and every stage. What a slice did is kept in campaign.json under bench/results/DEVICE, and its whole output
beside it; a slice that passed at this commit is not run again. campaign.md sums up what is there.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # `bench`, and no `kernels` for transformers to find

import tyro
from rich.console import Console

from bench.campaign_summary import summary
from bench.kernel_cases import BUILDERS
from bench.kernel_report import slug
from minimind.data.files import write_atomically, write_json
from minimind.device import choose_device, describe_device
from minimind.display import duration
from minimind.training.run_folder import versions

ROOT = Path(__file__).parents[1]
LIMIT = 480.0  # seconds of a slice
KERNEL_TESTS = ("rms_norm", "rope", "swiglu", "linear_cross_entropy", "linear_log_probs", "linear_distillation",
                "moe_routing", "moe_experts", "model", "memory")  # fmt: skip
DECODE_TESTS = ("decode_ops", "sampling_ops", "prefill", "engine")
SANITIZED = ("rms_norm", "rope", "swiglu", "moe_routing", "moe_experts")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")  # of compute-sanitizer
NATIVE_CHECK = "bench/native_check.py"
PRESETS = ("minimind2-small", "minimind2", "minimind2-moe")


@dataclass(frozen=True)
class Args:
    """Run what is left of the campaign."""

    minutes: float = 1e9
    """Start no slice that could end later than this."""
    only: tuple[str, ...] = ("",)
    """Only the slices with one of these in their name."""
    data: tuple[str, ...] = ()
    """Of the throughput slices of the presets, as in train/pretrain.py; None takes the built-in corpus."""
    again: bool = False
    """Also run slices that passed at this commit."""
    list: bool = False
    """Show the slices and what became of each, and run nothing."""
    device: str = "auto"
    """auto, cpu, cuda. A CPU runs the same slices on its own, smaller sizes."""


@dataclass(frozen=True)
class Slice:
    """needs: a program that must be on PATH."""

    name: str
    command: Sequence[str]
    needs: str | None = None


def slices(args: Args, cuda: bool) -> list[Slice]:
    python = sys.executable
    pytest = (python, "-m", "pytest", "-q")
    found = [Slice(f"parity {name}", (*pytest, f"tests/kernels/test_{name}.py")) for name in KERNEL_TESTS]
    found.append(Slice("parity attention", (*pytest, "tests/test_attention.py")))
    found += [Slice(f"parity {name}", (*pytest, f"tests/inference/test_{name}.py")) for name in DECODE_TESTS]
    if cuda:
        checked = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1", *pytest, "-x")
        for name in SANITIZED:
            test = f"tests/kernels/test_{name}.py"
            found.append(Slice(f"sanitizer {name}", (*checked, test), needs="compute-sanitizer"))
        for tool in SANITIZERS:
            watched = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", python, NATIVE_CHECK)
            found.append(Slice(f"sanitizer native {tool}", watched, needs="compute-sanitizer"))
    found.append(Slice("resources", (python, "bench/resources.py", "--dtype", "bf16")))
    found += [Slice(f"kernels {op}", (python, "bench/kernels.py", "--ops", op)) for op in BUILDERS]
    data = ("--data", *args.data) if args.data else ()
    for preset in PRESETS:
        peers = ["ours", "ours-eager", "compile", "hf", "liger", "upstream-style"]
        sizes = ("--rows", "64", "--steps", "30") if cuda else ("--steps", "5", "--warmup", "2")
        command = (python, "bench/throughput.py", "--preset", preset, "--peer", *peers, *sizes, *data)
        found.append(Slice(f"throughput {preset}", command))
    for stage in ("sft", "lora", "distill", "reason", "dpo"):
        sizes = ("--rows", "64", "--steps", "30") if cuda else ("--steps", "5", "--warmup", "2")
        command = (
            python,
            "bench/throughput.py",
            "--stage",
            stage,
            "--peer",
            "ours",
            "upstream-style",
            *sizes,
        )
        found.append(Slice(f"throughput {stage}", command))
    for batch in (1, 16, 64):
        command = (python, "bench/decode.py", "--batch", str(batch), *(("--turns", "5") if cuda else ()))
        found.append(Slice(f"decode batch {batch}", command))
    return [s for s in found if any(part in s.name for part in args.only)]


@dataclass
class Campaign:
    """state: what became of each slice, by name."""

    folder: Path
    commit: str
    console: Console
    state: dict[str, dict[str, Any]]

    def done(self, name: str) -> bool:
        before = self.state.get(name, {})
        return before.get("status") == "passed" and before.get("commit") == self.commit

    def run(self, piece: Slice) -> None:
        log = self.folder / "campaign" / f"{slug(piece.name)}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        start = time.time()
        if piece.needs is not None and shutil.which(piece.needs) is None:
            status, log_name = f"not run: {piece.needs} is not on PATH", None
        else:
            status, log_name = _execute(piece.command, log), str(log.relative_to(self.folder))
        seconds = round(time.time() - start, 1)
        self.state[piece.name] = {
            "status": status, "seconds": seconds, "commit": self.commit, "log": log_name,
            "command": " ".join(["python" if part == sys.executable else part for part in piece.command]),
        }  # fmt: skip
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "campaign.json", self.state)
        self.console.print(f"{piece.name}: {status}, {duration(seconds)}", highlight=False)


def _execute(command: Sequence[str], log: Path) -> str:
    with log.open("w", encoding="utf-8") as file:
        try:
            code = subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=LIMIT
            ).returncode
        except subprocess.TimeoutExpired:
            return f"failed: longer than {duration(LIMIT)}"
    return "passed" if code == 0 else f"failed: exit status {code}"


def main(args: Args) -> int:
    """The exit status: 0 if every slice that was asked for has passed at this commit."""
    console = Console()
    device = choose_device(args.device)
    stamp = versions(describe_device(device))
    folder = Path(__file__).parent / "results" / slug(stamp["device"])
    record = folder / "campaign.json"
    state = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    campaign = Campaign(folder, stamp["commit"] or "unknown", console, state)
    wanted = slices(args, device.type == "cuda")
    if not wanted:
        raise ValueError(f"--only {' '.join(args.only)}: no slice has this in its name")
    left = [s for s in wanted if args.again or not campaign.done(s.name)]
    if args.list:
        for piece in wanted:
            console.print(
                f"{piece.name}: {state.get(piece.name, {}).get('status', 'to be run')}", highlight=False
            )
        return 0
    console.print(f"{stamp['device']}: {len(left)} of {len(wanted)} slices to run", highlight=False)
    start = time.monotonic()
    for piece in left:
        if time.monotonic() - start + LIMIT > 60 * args.minutes:
            console.print(
                f"--minutes {args.minutes:g} leaves no room for {piece.name}; run this again", highlight=False
            )
            break
        campaign.run(piece)
    if folder.exists():
        write_atomically(folder / "campaign.md", summary(folder, stamp, campaign.state).encode())
        console.print(f"summary: {folder / 'campaign.md'}", highlight=False, soft_wrap=True)
    return 0 if all(campaign.done(piece.name) for piece in wanted) else 1


if __name__ == "__main__":
    try:
        status = main(tyro.cli(Args, description=__doc__))
    except ValueError as problem:
        raise SystemExit(f"error: {problem}") from None
    raise SystemExit(status)
