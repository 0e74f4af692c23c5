"""bench/host_time.py without its processes, which tests/kernels/test_compiled.py has: what is counted and refused."""

import pytest
from rich.console import Console

host_time = pytest.importorskip("bench.host_time", reason="needs Triton", exc_type=ImportError)
Args, main, one_more, row_of, show = (
    getattr(host_time, name) for name in ("Args", "main", "one_more", "row_of", "show")
)

STAMP = {"date": "today", "commit": "abc", "device": "cpu", "torch": "2", "triton": "3", "arch": 90}


def test_one_more_call_is_the_difference_of_two_graphs():
    few = row_of("swiglu", "launch", 2, [(30e-6, 50e-6), (20e-6, 40e-6), (25e-6, 99e-6)], STAMP)
    assert (few.forward_us, few.backward_us, few.forward_median_us) == pytest.approx((20, 40, 25))
    many = row_of("swiglu", "launch", 18, [(100e-6, 200e-6), (60e-6, 120e-6)], STAMP)
    each = one_more(few, many, "swiglu, one more call")
    assert (each.forward_us, each.backward_us, each.both_us) == pytest.approx((5, 10, 15))
    assert each.launches == 2 and each.what == "swiglu, one more call"


def test_the_table_shows_both_forms(capsys):
    rows = [
        row_of("nano", form, 34, [(a, b)], STAMP)
        for form, a, b in (("operator", 1.5e-3, 1.5e-3), ("launch", 0.4e-3, 0.6e-3))
    ]
    show(rows, Console(width=120))
    output = capsys.readouterr().out
    assert "1,500.0" in output and "3.00" in output and output.count("34") == 2


def test_the_forms_take_turns():
    asked = []

    class FakeWorker:
        def __init__(self, form):
            self.form = form

        def ask(self, request):
            _, runs = request
            asked.append((self.form, runs))
            return [(1.0, 2.0)] * runs if runs else 7

    forms = {"operator": FakeWorker("operator"), "launch": FakeWorker("launch")}
    times = host_time.time_forms("nano", Args(runs=2, turns=2), forms)
    assert times["launch"] == (7, [(1.0, 2.0)] * 4)
    assert asked[2:] == [("operator", 2), ("launch", 2)] * 2


@pytest.mark.parametrize(
    "given, message",
    [
        ({"preset": ("huge",)}, "--preset huge: unknown; choose from nano"),
        ({"op": ("attention",)}, "--op attention: unknown; choose from rms_norm"),
        ({"runs": 0}, "--runs 0: must be at least 1"),
    ],
)
def test_bad_arguments(given, message):
    with pytest.raises(ValueError, match=message):
        main(Args(**given))
