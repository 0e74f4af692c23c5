"""Running train/pretrain.py as a user does, and reading what it left."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "train" / "pretrain.py"
# One thread: the shapes are too small for two, and two suffer when other tests run beside them.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
TWO_THREADS = {"OMP_NUM_THREADS": "2", **os.environ}


def command(data: Path, out: Path, *extra: str) -> list[str]:
    flags = ["--data", str(data), "--out", str(out), "--seq-len", "64", "--batch-tokens", "512",
             "--evals", "2", "--log-every", "3", "--cache-dir", str(data.parent / "cache"), *extra]  # fmt: skip
    return [sys.executable, str(SCRIPT), *flags]


def run(arguments: list[str], env: dict[str, str] = ONE_THREAD) -> subprocess.CompletedProcess:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300, env=env)


def learn(stage: str, place: Path, *flags: str) -> Path:
    """Run a stage with its defaults as a user does who stands in the folder `place`; the run folder it leaves."""
    arguments = [sys.executable, str(SCRIPT.with_name(f"{stage}.py")), *flags]
    answer = subprocess.run(
        arguments, cwd=place, capture_output=True, text=True, timeout=3600, env=TWO_THREADS
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return place / re.findall("finished in (.+): see", answer.stdout)[-1]


def reproducible(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "time"} for row in rows]


def last_step(out: Path) -> int:
    """The newest complete training row on the disk."""
    if not (out / "metrics.jsonl").exists():
        return 0
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return max((row["step"] for row in rows if row["kind"] == "train"), default=0)
