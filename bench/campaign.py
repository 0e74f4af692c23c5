"""Everything that a card is asked, in one command that can be cut off and run again until it is done.

    python bench/campaign.py --list                    the slices, their minutes, and what became of each
    python bench/campaign.py --smoke                   every command at its smallest, rows thrown away: does one crash?
    python bench/campaign.py [--minutes 9] [--only kernels rl] [--data FILE...] [--chats FILE...]

The campaign is a list of slices (bench/cards/slices.py), each a command of its own that takes less than eight
minutes: parity, compute-sanitizer, training of every preset and stage, decoding, every op against its peers,
reinforcement learning, the server, pretraining and SFT to their end, timelines, tuning. What a slice did is kept in
campaign.json under bench/results/DEVICE, its rows beside it and its whole output in campaign/; a slice that passed at
this commit is not run again. One that fails stops no other, and is named at the end. campaign.md sums up what is there.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # `bench`, and no `kernels` for transformers to find

import torch
from rich.console import Console

from bench.cards.running import execute, last_line
from bench.cards.slices import LIMIT, Slice, slices
from bench.operators.report import slug
from bench.report.tables import device_report
from minimind.training.run_folder import versions
from minimind.utils.device import choose_device, describe_device
from minimind.utils.display import duration
from minimind.utils.files import write_atomically, write_json
from minimind.utils.stdio import command_line

ROOT = Path(__file__).parents[1]
PASSED = "passed"


@dataclass(frozen=True)
class Args:
    """Run what is left of the campaign."""

    minutes: float = 1e9
    """End by then: no slice is begun that would take longer by its estimate, and one that does is cut off."""
    only: tuple[str, ...] = ("",)
    """Only the slices with one of these in their name."""
    data: tuple[str, ...] = ()
    """Of pretraining, as in train/pretrain.py; None takes the built-in corpus."""
    chats: tuple[str, ...] = ()
    """Of SFT, as in train/sft.py; None takes the built-in conversations."""
    again: bool = False
    """Also run slices that passed at this commit."""
    list: bool = False
    """Show the slices and what became of each, and run nothing."""
    smoke: bool = False
    """Run every command as small as it goes and throw the rows away."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N. A CPU runs the same slices on its own, smaller sizes."""


@dataclass
class Campaign:
    """state: what became of each slice, by name; deadline: of time.monotonic()."""

    folder: Path
    commit: str
    console: Console
    state: dict[str, dict[str, Any]]
    environment: dict[str, str] = field(default_factory=dict)
    deadline: float = float("inf")

    def done(self, name: str) -> bool:
        before = self.state.get(name, {})
        return before.get("status") == PASSED and before.get("commit") == self.commit

    def run(self, piece: Slice) -> None:
        log = self.folder / "campaign" / f"{slug(piece.name)}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        start = time.time()
        if piece.needs is not None and shutil.which(piece.needs) is None:
            status, log_name = f"not run: {piece.needs} is not on PATH", None
        else:
            limit = min(LIMIT, self.deadline - time.monotonic())
            environment = {**os.environ, **self.environment, **piece.environment}
            status = outcome(execute(piece.command, ROOT, log, limit, environment), limit)
            log_name = str(log.relative_to(self.folder))
        seconds = round(time.time() - start, 1)
        self.state[piece.name] = {
            "status": status,
            "seconds": seconds,
            "commit": self.commit,
            "log": log_name,
            "command": " ".join(["python" if part == sys.executable else part for part in piece.command]),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "campaign.json", self.state)
        self.say(f"{piece.name}: {status}, {duration(seconds)}")

    def go_on(self, left: list[Slice]) -> None:
        """In their order, leaving out those for which there is no time."""
        for piece in left:
            if time.monotonic() + 60 * piece.minutes > self.deadline:
                self.say(f"{piece.name}: no time for its {piece.minutes:g} minutes; run this again")
            else:
                self.run(piece)

    def report(self, wanted: list[Slice]) -> None:
        """The slices that did not pass, each with the last line of its output."""
        for name, entry in ((s.name, self.state.get(s.name)) for s in wanted):
            if entry is None or entry["status"] == PASSED:
                continue
            said = last_line(self.folder / entry["log"]) if entry["log"] else ""
            self.say(f"{name}: {entry['status']}{': ' if said else ''}{said}")

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def outcome(code: int | None, limit: float) -> str:
    if code is None:
        return f"failed: cut off after {duration(limit)}"
    return PASSED if code == 0 else f"failed: exit status {code}"


def main(args: Args) -> int:
    """The exit status: 0 if every slice that was asked for has passed at this commit."""
    device = choose_device(args.device)
    stamp = versions(describe_device(device))
    if not args.smoke:
        return _run(args, device, stamp, Path(__file__).parent / "results" / slug(stamp["device"]))
    place = Path(tempfile.mkdtemp(prefix="minimind-smoke-"))
    status = _run(args, device, stamp, place)
    if status:
        print(f"what the commands said: {place / 'campaign'}")
    else:
        shutil.rmtree(place)
    return status


def _run(args: Args, device: torch.device, stamp: dict[str, Any], folder: Path) -> int:
    console = Console()
    record = folder / "campaign.json"
    state = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    deadline = time.monotonic() + 60 * args.minutes
    campaign = Campaign(folder, stamp["commit"] or "unknown", console, state, _visible(device), deadline)
    cuda = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if cuda else 0
    data, chats = ([str(Path(path).resolve()) for path in paths] for paths in (args.data, args.chats))
    every = slices(cuda, memory, data, chats, args.smoke, ("--out", str(folder)))
    wanted = [s for s in every if any(part in s.name for part in args.only)]
    if not wanted:
        raise ValueError(f"--only {' '.join(args.only)}: no slice has this in its name; --list shows them")
    left = [s for s in wanted if args.again or not campaign.done(s.name)]
    minutes = sum(s.minutes for s in left)
    campaign.say(f"{stamp['device']}: {len(left)} of {len(wanted)} slices to run, about {minutes:g} minutes on an H100")
    if args.list:
        for piece in wanted:
            status = PASSED if piece not in left else state.get(piece.name, {}).get("status", "to be run")
            campaign.say(f"{piece.minutes:4g} min  {piece.name}: {status}")
        return 0
    campaign.go_on(left)
    if not args.smoke and folder.exists():
        write_atomically(folder / "campaign.md", device_report(folder, stamp, campaign.state).encode())
        campaign.say(f"summary: {folder / 'campaign.md'}")
    campaign.report(wanted)
    return 0 if all(campaign.done(piece.name) for piece in wanted) else 1


def _visible(device: torch.device) -> dict[str, str]:
    """So that every command sees the device that was asked for, and takes it by itself."""
    if device.type == "cpu":
        return {"CUDA_VISIBLE_DEVICES": ""}
    return {} if device.index is None else {"CUDA_VISIBLE_DEVICES": str(device.index)}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the slice that runs is ended, not left behind
    try:
        status = main(command_line(Args, __doc__))
    except (ValueError, OSError) as problem:
        raise SystemExit(f"error: {problem}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    raise SystemExit(status)
