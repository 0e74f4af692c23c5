"""Draw the rewards of several reinforcement learning runs, which differ in their seed, in one picture.

python bench/rl_curves.py runs/grpo-1 runs/grpo-2 runs/grpo-3 --out docs/grpo.png
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])

import tyro

from bench.common.command import run as run_command
from bench.common.plots import plt, save
from minimind.training.metrics import read_metrics, smooth
from minimind.utils.display import caption


@dataclass(frozen=True)
class Args:
    """Draw runs of train/grpo.py, ppo.py or spo.py together."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """The runs' folders."""
    out: Path = Path("rl.png")
    """File of the picture."""


def main(args: Args) -> None:
    """ValueError names a folder without such a run."""
    if not args.runs:
        raise ValueError("RUNS: name folders of runs of train/grpo.py, ppo.py or spo.py")
    figure, (held, rolled, spread) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for number, run in enumerate(args.runs):
        config = run / "config.json"
        if not config.is_file():
            raise ValueError(f"{run}: not a run folder; name runs of train/grpo.py, ppo.py or spo.py")
        saved = json.loads(config.read_text(encoding="utf-8"))
        rows = read_metrics(run / "metrics.jsonl")
        evals = [row for row in rows if row["kind"] == "eval"]
        rollouts = [row for row in rows if row["kind"] == "rollout"]
        if not rollouts or not all("heldout_reward" in row for row in evals[-1:]):
            raise ValueError(f"{run}: no rewards in its metrics.jsonl; is it a run of train/grpo.py, ppo.py or spo.py?")
        colour, label = f"C{number}", f"seed {saved['args']['seed']}: {evals[-1]['heldout_reward']:.3f}"
        steps = [row["step"] for row in evals]
        held.plot(steps, [row["heldout_reward"] for row in evals], "o-", color=colour, markersize=4, label=label)
        held.plot(steps, [row["heldout_greedy_reward"] for row in evals], ":", color=colour)
        steps, rewards = [row["step"] for row in rollouts], [row["reward"] for row in rollouts]
        rolled.plot(steps, rewards, color=colour, alpha=0.3, linewidth=0.8)
        rolled.plot(steps, smooth(rewards), color=colour)
        spread.plot(steps, [row["entropy"] for row in rollouts], color=colour)
    for axes, title in (
        (held, "held-out reward (dotted: of greedy answers)"),
        (rolled, "reward of the rollouts"),
        (spread, "entropy of a token, nats"),
    ):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("optimizer steps")
        axes.grid(alpha=0.3)
    held.set_ylim(0, 1)
    held.legend()
    figure.suptitle(caption(f"train/{saved['stage']}.py, {saved['args']['data'] or 'the built-in sums'}"))
    save(figure, args.out, dpi=110)


if __name__ == "__main__":
    run_command(main, Args, __doc__)
