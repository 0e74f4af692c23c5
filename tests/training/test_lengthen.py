"""Lengthened runs, and how their learning rate continues."""

from __future__ import annotations

import gc
import json
import math
from pathlib import Path

import pytest

from minimind.training.checkpoint import list_checkpoints, step_of
from minimind.training.optim import RateSchedule
from tests.training.runs import SCRIPT, TINY, as_killed, call, rows_of, save_origin

PLANNED, LONGER = 20, 40


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Path:
    return save_origin(TINY, tmp_path_factory.mktemp("origin"))


@pytest.fixture(scope="module")
def place(origin, data) -> tuple[Path, Path]:
    """(the initial model, the data)."""
    return origin, data


def train(place: tuple[Path, Path], out: Path, steps: int = PLANNED, **flags) -> Path:
    origin, data = place
    call(SCRIPT, from_=str(origin), data=(str(data),), out=str(out), cache_dir=str(data.parent / "cache"), seq_len=64,
         batch_tokens=512, tokens=512 * steps,
         **{"evals": 1, "save_every": 3, "keep_checkpoints": 1, **flags})  # fmt: skip
    gc.collect()  # the run's lock goes with its objects
    return out


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


WSD = {"schedule": "wsd", "cooldown": 0.5}


@pytest.fixture(scope="module")
def stable(place, tmp_path_factory) -> Path:
    return train(place, tmp_path_factory.mktemp("runs") / "stable", **WSD)


def test_a_checkpoint_before_the_cooldown_is_kept(stable):
    assert [step_of(path) for path in list_checkpoints(stable)] == [10, 20]


@pytest.mark.heavy
def test_a_lengthened_run_with_a_stable_phase_is_the_longer_run(stable, place, tmp_path):
    """They are equal bit for bit, since the longer run begins before the rate falls. The earlier run is not changed,
    and the same command continues an interrupted longer run."""
    before = files(stable)
    out = train(place, tmp_path / "out", LONGER, lengthen=str(stable), keep_checkpoints=9, **WSD)
    planned = train(place, tmp_path / "planned", LONGER, **WSD)
    assert rows_of(out, "train") == rows_of(planned, "train")
    assert files(stable) == before
    config = json.loads((out / "config.json").read_text())
    assert config["lengthens"] == str(stable) and config["legs"] == [[PLANNED, 10]]
    cut = as_killed(out, 24, tmp_path / "cut")
    train(place, cut, LONGER, lengthen=str(stable), **WSD)
    assert rows_of(cut, "train") == rows_of(out, "train")


def test_a_fallen_rate_rises_to_the_longer_run_s_curve(place, tmp_path):
    """Finished with --keep-best, whose figures go on too, then lengthened twice."""
    settings = {"lr": 0.01, "warmup": 0.2, "keep_best": True, "evals": 2}
    first = train(place, tmp_path / "first", 10, **settings)
    second = train(place, tmp_path / "second", 20, lengthen=str(first), **settings)
    third = train(place, tmp_path / "third", 30, lengthen=str(second), **settings)
    rates = [row["lr"] for row in rows_of(third, "train")]
    assert len(rates) == 30 and rates[:20] == [row["lr"] for row in rows_of(second, "train")]
    assert rates[:10] == [row["lr"] for row in rows_of(first, "train")]
    warmup = 2  # of the first run, whatever the length

    def cosine(step: int, steps: int) -> float:
        share = (step - warmup + 1) / (steps - warmup)
        return 0.01 * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))

    assert rates[9] == pytest.approx(0.001)
    assert rates[10] == pytest.approx((0.001 + cosine(10, 20)) / 2)
    assert rates[11:20] == pytest.approx([cosine(step, 20) for step in range(11, 20)])
    assert rates[21:] == pytest.approx([cosine(step, 30) for step in range(21, 30)])
    assert sum(path.name.startswith("best-") for path in (third / "checkpoints").iterdir()) == 1
    losses = [row["loss"] for row in rows_of(third, "train")]
    assert max(losses[10:]) < losses[2]  # it did not begin anew


def test_an_unfinished_run_is_lengthened_from_its_newest_checkpoint(stable, place, tmp_path):
    cut = as_killed(stable, 10, tmp_path / "cut")
    out = train(place, tmp_path / "out", LONGER, lengthen=str(cut), **WSD)
    assert len(rows_of(out, "train")) == LONGER


def test_a_constant_rate_continues():
    schedule = RateSchedule("constant", 90, warmup=4, legs=((40, 40),))
    assert [schedule.factor(step) for step in (3, 39, 40, 89)] == [1] * 4
    assert schedule.describe() == (
        "lengthened at step 40 from 40 steps to 90: the rate goes on at 1.00 of the peak and then as in a run of 90"
    )


def test_the_rise_from_a_finished_cosine_is_described():
    assert RateSchedule("cosine", 80, warmup=4, legs=((40, 40),)).describe() == (
        "lengthened at step 40 from 40 steps to 80: the rate goes from 0.10 of the peak to 0.51 over 4 steps and then "
        "as in a run of 80"
    )


@pytest.mark.parametrize(
    ("steps", "flags", "message"),
    [
        (LONGER, {"lr": 0.5}, r"--lengthen .*stable: started with lr None \(now 0\.5\); --tokens, --epochs and"),
        (PLANNED, {}, "stable: planned for 20 steps, and these flags amount to 20; give a larger --tokens"),
        (LONGER, {"lengthen": "absent"}, "--lengthen absent: not a run folder"),
    ],
)
def test_errors_are_one_line(steps, flags, message, stable, place, tmp_path):
    with pytest.raises(ValueError, match=message) as problem:
        train(place, tmp_path / "out", steps, **{"lengthen": str(stable), **WSD, **flags})
    assert "\n" not in str(problem.value) and not (tmp_path / "out").exists()


def test_a_run_is_not_lengthened_in_its_own_folder(stable, place):
    with pytest.raises(ValueError, match=r"started with tokens 10240 \(now 20480\); to lengthen it use --lengthen"):
        train(place, stable, LONGER, **WSD)
