"""bench/transfer.py: parabolas and rules with known answers, scans by hand, and runs that are not repeated."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from filelock import FileLock
from rich.console import Console

from bench import transfer
from bench.common.record import RESULTS
from bench.rates import plan as transfer_plan
from bench.rates.fit import NOISE, PRODUCT, Optimum, fit, next_rate, noise_of, optima_of, optimum
from bench.rates.plan import OutOfTimeError, Sweep, planned, start_of
from bench.rates.plot import plot
from bench.rates.runs import Point, TransferRow, family, read, train, write
from bench.transfer import Args
from minimind.config import PRESETS
from minimind.training.arguments import pretraining_lr
from minimind.training.metrics import read_metrics
from train import pretrain

POINT = Point("poems", 128, 4, 204_800)


def losses(best: float, rates, curvature: float = 0.05, floor: float = 3.0) -> dict[float, float]:
    return {r: floor + curvature * math.log2(r / best) ** 2 for r in rates}


def walk(point: Point, loss, start: float) -> dict[float, float]:
    known: dict[float, float] = {}
    while (rate := next_rate(known, start)) is not None:
        known[rate] = loss(rate)
    return known


@pytest.mark.parametrize("best", [3e-3, 4e-3, 5.5e-3])
@pytest.mark.parametrize("rates", [(2e-3, 4e-3, 8e-3), (1e-3, 2e-3, 4e-3, 8e-3, 16e-3)])
def test_parabola_is_found_again(best, rates):
    found = optimum(POINT, losses(best, rates), noise=0.0)
    assert found.rate == pytest.approx(best) and found.error == pytest.approx(0, abs=1e-9)
    assert found.loss == pytest.approx(3.0) and found.curvature == pytest.approx(0.05)


def test_error_of_the_best_rate_is_that_of_its_losses():
    """b of a x^2 + b x through x = -1, 0, 1 has the error s / sqrt 2, so the vertex -b / 2a has s / (2 sqrt 2 a)."""
    found = optimum(POINT, losses(4e-3, (2e-3, 4e-3, 8e-3)), noise=0.002, draws=4000)
    assert found.error == pytest.approx(0.002 / (2 * math.sqrt(2) * 0.05), rel=4 / math.sqrt(2 * 4000))


def test_a_lowest_loss_at_an_end_gives_no_best_rate():
    assert optimum(POINT, losses(4e-3, (4e-3, 8e-3, 16e-3))) is None
    assert optimum(POINT, losses(4e-3, (2e-3, 4e-3))) is None
    assert optimum(POINT, {**losses(4e-3, (2e-3, 4e-3)), 8e-3: math.inf}) is None


def test_a_steep_loss_far_away_does_not_move_the_best_rate():
    near = losses(4.4e-3, (2e-3, 4e-3, 8e-3))
    assert optimum(POINT, {**near, 16e-3: 9.0, 1e-3: 8.0}, noise=0.0).rate == pytest.approx(4.4e-3)


@pytest.mark.parametrize("start", [5e-4, 4e-3, 64e-3])
@pytest.mark.parametrize("best", [2.1e-3, 6e-3, 15e-3])
def test_scan_ends_with_the_lowest_between_two(start, best):
    known = walk(POINT, lambda rate: losses(best, (rate,))[rate], start)
    assert optimum(POINT, known, noise=0.0).rate == pytest.approx(best)
    assert len(known) <= 3 + abs(math.log2(start / best)) + 1


def test_a_scan_returns_from_infinite_losses():
    known = walk(POINT, lambda rate: math.inf if rate > 9e-3 else losses(3e-3, (rate,))[rate], 64e-3)
    assert optimum(POINT, known, noise=0.0).rate == pytest.approx(3e-3)


def test_scan_without_a_lowest_ends():
    assert len(walk(POINT, lambda rate: -rate, 4e-3)) == 9


def made(point: Point, log_rate: float, error: float = 0.0) -> Optimum:
    return Optimum(point, log_rate, error, 3.0, 0.05, 3)


def known_rule(point: Point) -> float:
    """log2 of 0.005 (width / 256)^-0.5 (steps / 50)^-0.25, half as much on prose."""
    return (
        math.log2(5e-3)
        - 0.5 * math.log2(point.width / 256)
        - 0.25 * math.log2(point.steps / 50)
        + 0.5 * (1 if point.corpus == "poems" else -1)
    )


POINTS = [
    p
    for _, p in planned(("poems", "prose"), (128, 192, 256, 384, 512), 204_800)
    if (p.optimizer, p.stage, p.embedding, p.warmup) == ("muon", "pretrain", 1.0, 0.02)
]


def test_rule_is_found_again():
    rule = fit([made(p, known_rule(p)) for p in POINTS])
    assert rule.rate == pytest.approx(5e-3) and rule.spread == pytest.approx(0, abs=1e-9)
    assert {t.name: pytest.approx(t.exponent) for t in rule.terms} == {"width": -0.5, "steps": -0.25}
    assert {t.name for t in rule.dropped} == {"depth", "batch_tokens", PRODUCT}
    there = replace(POINT, width=512, tokens=819_200, corpus="another")
    assert rule(there) == pytest.approx(5e-3 * 2**-0.5 * 4**-0.25)


def test_the_fall_over_steps_may_depend_on_the_width():
    """steps^(-0.25 + 0.25 log2(width / 256)): the width stays, though it has no other effect."""

    def log_rate(point: Point) -> float:
        return -8 + 0.25 * math.log2(point.steps / 50) * (math.log2(point.width / 256) - 1)

    rule = fit([made(p, log_rate(p)) for p in POINTS])
    exponents = {t.name: pytest.approx(t.exponent, abs=1e-9) for t in rule.terms}
    assert exponents == {"width": 0.0, "steps": -0.25, PRODUCT: 0.25}
    assert rule(replace(POINT, width=512, tokens=819_200)) == pytest.approx(2**-8)


def test_terms_within_the_noise_are_dropped_and_others_kept():
    """Best rates with an error of 0.15: the true rule has no depth, and its exponent of the width is far above the
    error."""
    kept = []
    for seed in range(8):
        generator = np.random.default_rng(seed)
        optima = [made(p, known_rule(p) + generator.normal(0, 0.15), 0.15) for p in POINTS]
        rule = fit(optima)
        kept.append({t.name for t in rule.terms})
        width = next(t for t in rule.terms if t.name == "width")
        assert abs(width.exponent + 0.5) < 4 * width.error * 0.15 / rule.spread  # the error with the true spread
    assert sum("depth" in names for names in kept) <= 2  # of eight, each with a chance of about one in ten


def test_too_few_scans_make_no_rule():
    with pytest.raises(ValueError, match="too few"):
        fit([made(POINT, -8.0), made(replace(POINT, width=256), -8.5)])


def rows(point: Point, best: float, shift=(0.0, 0.0, 0.0)) -> list[TransferRow]:
    rates = (2e-3, 4e-3, 8e-3)
    found = losses(best, rates)
    return [TransferRow(point, r, found[r] + s, 1.0, 1000, 50, 1.0) for r, s in zip(rates, shift, strict=True)]


def test_noise_is_the_difference_that_two_seeds_do_not_share():
    first = rows(POINT, 4e-3)
    assert noise_of(first) is None
    second = rows(replace(POINT, seed=2), 4e-3, (0.51, 0.49, 0.5))
    # gaps of 0.51, 0.49 and 0.5 vary by 1e-4 (two degrees of freedom), each the difference of two losses
    assert noise_of([*first, *second]) == pytest.approx(math.sqrt(1e-4 / 2))


def test_family_holds_nano():
    assert family(192, 4) == PRESETS["nano"]
    with pytest.raises(ValueError, match="--widths 100"):
        family(100, 4)


def test_rows_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "rows" / "transfer.jsonl"
    assert read(path) == []
    kept = [*rows(POINT, 4e-3), TransferRow(replace(POINT, seed=3), 1.0, None, None, 0, 50, 1.0, {"device": "CPU"})]
    for row in kept:
        write(path, row)
    assert read(path) == kept and kept[-1].loss == math.inf
    path.write_text(path.read_text() + '{"rate": 1}\n')
    with pytest.raises(ValueError, match=r"transfer.jsonl:5: not a row of this version"):
        read(path)


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A sweep whose runs take no time. runs: those that began; limit: the number after which one is interrupted."""
    state = {"runs": [], "limit": math.inf}

    def fake(point, rate, data, work):
        state["runs"].append((point, rate))
        if len(state["runs"]) >= state["limit"]:
            raise KeyboardInterrupt
        best = 4e-3 * (point.width / 128) ** -0.5
        return TransferRow(point, rate, losses(best, (rate,))[rate], 1.0, 1000, 50, 1.0)

    monkeypatch.setattr(transfer_plan, "train", fake)

    def make(minutes=None):
        work = tmp_path / "work"
        work.mkdir(exist_ok=True)
        return Sweep(tmp_path / "transfer.jsonl", work, str, Console(quiet=True), minutes)

    return make, state


def test_an_interrupted_sweep_continues_and_repeats_nothing(sweep, tmp_path):
    make, state = sweep
    plan = planned(("poems",), (128, 256), 204_800, ("tokens", "width"))
    make().scans(plan)
    whole = read(tmp_path / "transfer.jsonl")
    (tmp_path / "transfer.jsonl").unlink()
    for limit in (3, 5, 8, math.inf):  # of all runs begun until then
        state["limit"] = limit + len(whole)
        if limit == math.inf:
            make().scans(plan)
        else:
            with pytest.raises(KeyboardInterrupt):
                make().scans(plan)
    again = read(tmp_path / "transfer.jsonl")
    assert again == whole and len({(r.point, r.rate) for r in again}) == len(again)
    assert len(state["runs"]) == 2 * len(whole) + 3  # those that were cut off began twice
    make().scans(plan)
    assert read(tmp_path / "transfer.jsonl") == whole


def test_scans_of_another_process_are_skipped(sweep, tmp_path):
    make, state = sweep
    plan = planned(("poems",), (128, 256), 204_800, ("tokens", "width"))
    mine = make()
    with FileLock(tmp_path / "work" / f"{plan[0][1].name}.lock"):
        mine.scans(plan)
    assert {p for p, _ in state["runs"]} == {p for _, p in plan[1:]}


def test_no_run_begins_after_the_minutes(sweep):
    make, state = sweep
    with pytest.raises(OutOfTimeError):
        make(minutes=0).scans(planned(("poems",), (128,), 204_800, ("tokens",)))
    assert state["runs"] == []


def test_a_scan_begins_at_the_best_rate_of_the_most_similar_scan():
    optima = [made(POINT, math.log2(4.4e-3)), made(replace(POINT, width=512), math.log2(1.1e-3))]
    assert start_of(replace(POINT, width=384), optima) == pytest.approx(1e-3)
    assert start_of(replace(POINT, tokens=409_600), optima) == pytest.approx(4e-3)
    assert start_of(replace(POINT, optimizer="adamw"), optima) == 8e-3


def test_plan_names_no_scan_twice_and_refuses_unknown_names():
    plan = planned(("poems", "prose"), (128, 192, 256, 384, 512), 204_800)
    assert len({p for _, p in plan}) == len(plan) == len({p.name for _, p in plan})
    assert [n for n, _ in plan].index("width") > [n for n, _ in plan].index("tokens")
    with pytest.raises(ValueError, match="--only depths: choose from tokens, width"):
        planned(("poems",), (128,), 204_800, ("depths",))


def test_picture_and_table_of_the_rows(sweep, tmp_path, monkeypatch, capsys):
    make, _ = sweep
    make().scans(planned(("poems",), (128, 256, 512), 204_800, ("tokens", "width", "seed", "adamw")))
    monkeypatch.setattr(transfer, "PICTURE", tmp_path / "transfer.png")
    outcome = transfer.main(Args(plot=True, out=str(tmp_path)))
    assert (tmp_path / "transfer.png").read_bytes().startswith(b"\x89PNG")
    (term,) = outcome["rules"]["pretrain muon"]["terms"]
    assert (term["name"], term["exponent"]) == ("width", pytest.approx(-0.5))
    shown = capsys.readouterr().out
    assert "pretrain muon: 2.83e-03" in shown and "width^(-0.50" in shown
    with pytest.raises(ValueError, match="no scan has a best rate"):
        plot([], tmp_path / "none.png")


def test_check_takes_the_rule_and_its_neighbours(sweep, tmp_path):
    make, state = sweep
    data = tmp_path / "poems.jsonl"
    data.write_text("{}\n")
    args = Args(data=(str(data),), check=True, out=str(tmp_path), work=str(tmp_path / "work"))
    with pytest.raises(ValueError, match="needs a rule"):
        transfer.main(args)
    make().scans(planned(("poems",), (128, 256, 512), 204_800, ("tokens", "width", "seed")))
    state["runs"].clear()
    transfer.main(args)
    assert [(p.preset, p.width, p.tokens) for p, _ in state["runs"]] == [("minimind2-small", 512, 1_000_000)] * 3
    assert [r for _, r in state["runs"]] == [0.002, 0.004, 0.001]
    transfer.main(args)
    assert len(state["runs"]) == 3


def test_a_run_is_that_of_the_script(tmp_path, monkeypatch):
    """The same held-out loss as train/pretrain.py with these flags, to the last digit: five iterations, all layers."""
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "poems.jsonl"
    texts = (f"Line {i} of {i * i % 89} lines, and {i % 7} more of them. " * (1 + i % 9) for i in range(300))
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    point = Point("poems", 192, 4, 2048, 1024, seed=5)
    row = train(point, 3e-3, str(data), tmp_path / "work")
    assert list((tmp_path / "work").iterdir()) == [] and row.steps == 2 and row.about["precision"] in ("bf16", "fp32")
    flags = pretrain.Args(
        data=(str(data),),
        tokens=2048,
        batch_tokens=1024,
        lr=3e-3,
        seed=5,
        evals=1,
        muon_iterations=5,
        depth_warmup=0.0,
        out=str(tmp_path / "run"),
    )
    monkeypatch.setattr(pretrain, "continue_texts", lambda *_: "")
    assert pretrain.main(flags, Console(quiet=True))
    last = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "eval"][-1]
    assert (row.heldout_loss, row.heldout_tokens) == (last["heldout_loss"], last["heldout_tokens"])


@pytest.mark.heavy
def test_scans_of_sft_share_one_pretrained_model(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps({"text": f"Some text, number {i}. " * 9}) + "\n" for i in range(60)))
    point = Point("conversations", 64, 1, 512, 512, stage="sft")
    work = tmp_path / "work"
    first = train(point, 1e-3, str(data), work)
    (base,) = work.iterdir()
    made = (base / "finished").stat().st_mtime_ns
    again, other = train(point, 1e-3, str(data), work), train(point, 2e-3, str(data), work)
    assert (base / "finished").stat().st_mtime_ns == made and list(work.iterdir()) == [base]
    assert math.isfinite(first.loss) and first.heldout_tokens > 1000
    assert again.loss == first.loss != other.loss


def test_noise_is_assumed_without_two_seeds():
    assert (
        optimum(POINT, losses(4e-3, (2e-3, 4e-3, 8e-3))).error
        == optimum(POINT, losses(4e-3, (2e-3, 4e-3, 8e-3)), NOISE).error
    )


def test_the_rule_of_pretraining_is_that_of_the_committed_rows():
    rows = [row for file in RESULTS.glob("*/transfer.jsonl") for row in read(file)]
    rule = transfer.rules_of(optima_of(rows))["pretrain muon"]
    wide = replace(POINT, width=512)
    for point in (POINT, wide, replace(POINT, depth=8), *(replace(p, tokens=819_200) for p in (POINT, wide))):
        rate, _ = pretraining_lr("muon", point.config, point.steps, 0.0)
        assert rate == pytest.approx(rule(point), rel=0.06), point  # the rate has two digits
    assert {term.name for term in rule.terms} == {"width", "depth", "steps", PRODUCT}
    assert 2**rule.spread < 1.2
