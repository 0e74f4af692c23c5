"""What a stage takes where nobody says: passes over the data, and the optimizer. docs/training.md has the sources.

Built-in data are small and made up: their passes are what their learning tests were tuned with. Files of a user get as
many as upstream MiniMind takes of data of its kind, more where a run would otherwise hardly begin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from minimind.training.optim import OptimizerName
from minimind.utils.files import read_json

# Upstream takes 10 passes over its 34 MB of lora_medical and took 50 over the 91 rows of lora_identity.
MOST = 5


@dataclass(frozen=True)
class Passes:
    """builtin: over the data that come with the program; files: over the user's, and why; least: tokens of a run below
    which there are more, up to MOST times `files`."""

    builtin: float
    files: float
    why: str = ""
    least: int = 0


_STEPS = 100  # of 4096 tokens, or of an adapter 1024: the smallest that the stages take
PASSES = {
    "pretrain": Passes(1, 1),
    "distill": Passes(1, 1),
    "sft": Passes(3, 2, "upstream's, of data of this size", _STEPS * 4096),
    "reason": Passes(4, 1, "upstream's, of data of this size", _STEPS * 4096),
    "lora": Passes(6, 10, "upstream's, of data of this size", _STEPS * 1024),
    "dpo": Passes(6, 1, "upstream's, of data of this size", _STEPS * 4096),
    # Ouyang et al. 2022 (arXiv 2203.02155, C.2)
    "reward": Passes(6, 1, "more overfit a reward model", _STEPS * 4096),
}


def passes(stage: str, builtin: bool, tokens: int) -> tuple[float, str]:
    """(passes over training data of `tokens`, why in one line: empty where it is as ever)."""
    known = PASSES[stage]
    if builtin or not known.least:
        return float(known.builtin if builtin else known.files), ""
    needed = math.ceil(known.least / max(1, tokens))
    if needed <= known.files:
        return float(known.files), f"--epochs {known.files:g}: {known.why}"
    found = float(min(needed, MOST * known.files))
    return found, (
        f"--epochs {found:g}: a pass has {tokens:,} tokens only; {known.least:,} are the least that a run should see, "
        f"in at most {MOST * known.files:g} passes"
    )


def optimizer(weights: Path | None, adapter: bool = False) -> tuple[OptimizerName, str]:
    """(what a run that begins with `weights`, None for random ones, is trained with; why in one line). adapter: it
    trains a low-rank adapter on them."""
    if adapter:
        return "adamw", "--optimizer adamw: it is what adapters are trained with"
    if weights is None:
        return "muon", "--optimizer muon: no weights from elsewhere are named"
    earlier = trained_with(weights)
    if earlier is not None:
        return earlier, f"--optimizer {earlier}: as the run that the weights are of"
    return "adamw", (
        "--optimizer adamw: the weights are of no run of ours, and released models are AdamW's, which Muon does not "
        "improve on (docs/training.md)"
    )


def trained_with(weights: Path) -> OptimizerName | None:
    """The optimizer of the run whose folder `weights` lie in; None where they lie in none."""
    for folder in weights.parents[:2]:
        config = read_json(folder / "config.json") or {}
        for part in (config.get("args"), config.get("chosen")):
            said = part.get("optimizer") if isinstance(part, dict) else None
            if said in ("muon", "adamw"):
                return said
    return None
