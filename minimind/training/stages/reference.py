"""Log-probabilities under the model a run begins with: worked out once for a whole data set and kept on disk.

So there is no second model in memory and no second forward in a step. As nothing else decides them, they are kept under
a key of the weights, the data, the row length and the precision, and serve every later run over the same pairs.
"""

from __future__ import annotations

import io
import json
import time
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from minimind import ops
from minimind.data import Corpus
from minimind.data.pair_loader import PairLoader
from minimind.modeling import Model
from minimind.objectives.preference import pair_log_probs
from minimind.training.parallel import Parallel
from minimind.training.stages.pairs import to_device
from minimind.utils.display import Display, duration, say
from minimind.utils.files import cache_root, disk_full, is_disk_full, make_folder, write_atomically

FORMAT_VERSION = 1


def reference_log_probs(
    model: Model,
    weights: str | None,
    view: Corpus,
    seq_len: int,
    rows: int,
    parallel: Parallel,
    console: Console,
    cache_dir: str | None = None,
    share: bool = False,
) -> np.ndarray:
    """float64 [pairs of `view`, 2], memory-mapped: log p(chosen) and log p(rejected), 0 for pairs longer than a row.

    weights: what names the model's weights, as Origin.fingerprint does. rows: of a batch of all ranks together, which
    share the work; all call it, and all return the same. share: as PairLoader has it. Raises ValueError when the
    cache's folder cannot be written.
    """
    folder = make_folder(cache_root(cache_dir) / "reference")
    path = folder / f"{_key(model, weights, view, seq_len, share)}.npy"
    shape = (view.num_documents, 2)
    if not _everywhere(path, shape, parallel, model.device):
        scores = _work_out(model, view, seq_len, rows, parallel, console, share)
        if _open(path, shape) is None:  # of several nodes each may have its own folder
            _write(path, scores)
        parallel.sum(torch.zeros(1, device=model.device))  # until all have written
    found = _open(path, shape)
    if found is None:
        raise ValueError(f"{path}: what was written there cannot be read back; check the disk")
    return found


def _key(model: Model, weights: str | None, view: Corpus, seq_len: int, share: bool) -> str:
    precision = [str(model.compute_dtype), model.device.type, ops.get_mode()]
    parts = [FORMAT_VERSION, weights, model.config.to_dict(), view.identity, seq_len, share, *precision]
    return blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _open(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The scores; None where there are none or they are damaged."""
    try:
        scores = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return scores if scores.shape == shape and scores.dtype == np.float64 else None


def _everywhere(path: Path, shape: tuple[int, int], parallel: Parallel, device: torch.device) -> bool:
    missing = torch.tensor([float(_open(path, shape) is None)], device=device)
    return parallel.sum(missing).item() == 0


@torch.no_grad()
def _work_out(
    model: Model, view: Corpus, seq_len: int, rows: int, parallel: Parallel, console: Console, share: bool
) -> np.ndarray:
    model.eval()
    device = model.device
    loader = PairLoader(view, seq_len, rows, 0, False, parallel.rank, parallel.world_size, share)
    steps = -(-loader.tokens_per_epoch // (rows * seq_len))  # about: padding adds a few
    scores = np.zeros((view.num_documents, 2))
    display, began = Display(console, steps, 0), time.monotonic()
    try:
        for step, host in enumerate(loader.epoch_batches(), 1):
            batch = to_device(host, device)
            pairs, _ = pair_log_probs(model, batch)
            scores[host.pairs] = torch.stack((pairs.chosen, pairs.rejected), 1).cpu().numpy()
            left = (time.monotonic() - began) / step * max(0, steps - step)
            display.update(min(step, steps), f"of the reference log-probabilities  ETA {duration(left)}")
    finally:
        display.close()
    seconds = time.monotonic() - began
    say(console, f"reference log-probabilities of {loader.num_pairs:,} pairs in {seconds:.1f} s")
    return parallel.sum(torch.from_numpy(scores).to(device)).cpu().numpy()


def _write(path: Path, scores: np.ndarray) -> None:
    data = io.BytesIO()
    np.save(data, scores)
    try:
        write_atomically(path, data.getvalue())
    except OSError as error:
        if is_disk_full(error):
            raise disk_full(path.parent, len(data.getvalue())) from None
        raise
