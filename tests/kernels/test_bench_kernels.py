"""bench/kernels.py on a CPU and few tokens: the numerics check, the formulas, the rows."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import kernels
from bench.common.record import append, columns_of, slug
from bench.common.timing import PASSES, Step, pass_step, time_in_turns
from bench.operators import implementations, tuning
from bench.operators.cases import (
    BUILDERS,
    KernelSetting,
    applies,
    build,
    head_work,
    moe_work,
    norm_work,
    rope_work,
    swiglu_work,
)
from bench.operators.parity import ALLOWED, worst_ratio
from bench.operators.report import KernelRow, plot
from minimind.config import PRESETS, ModelConfig
from tests.kernels.contract import DEVICE

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TINY = ModelConfig(
    hidden_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=12, intermediate_size=40, vocab_size=131,
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
)  # fmt: skip
TINY_NORMED = dataclasses.replace(TINY, qk_norm=True, num_experts_per_tok=1)
STAMP = {name: name for name in ("date", "commit", "device", "torch", "triton", "liger")}


@pytest.fixture(autouse=True)
def _tiny_presets(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    monkeypatch.setitem(PRESETS, "tiny-normed", TINY_NORMED)


def preset_of(op: str) -> str:
    return "tiny" if applies(op, TINY) else "tiny-normed"


def bench(runs: int = 2) -> kernels.Bench:
    return kernels.Bench(CPU, torch.float32, runs, {"GB/s": 10.0, "TFLOP/s": 0.1}, STAMP)


def row(**changes) -> KernelRow:
    fixed = {"op": "swiglu", "preset": "tiny", "shape": "I 40", "tokens": 64, "dtype": "float32"}
    values = STAMP | fixed | {"phase": "both", "contender": "minimind", "status": "ok"}
    return KernelRow(**(values | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", BUILDERS)
def test_our_kernels_pass_the_numerics_check(op, dtype):
    case = build(op, preset_of(op), 40, dtype, DEVICE, compiled=False, kernels=True)
    assert worst_ratio(case.implementations["minimind"], case.reference, case.leaves) <= ALLOWED


@pytest.mark.parametrize("op", BUILDERS)
def test_cpu_forms_pass_the_numerics_check(op):
    case = build(op, preset_of(op), 40, torch.float32, CPU, compiled=False)
    assert list(case.implementations) == ["minimind", "eager"]
    assert worst_ratio(case.implementations["minimind"], case.reference, case.leaves) <= ALLOWED


@pytest.mark.skipif(not implementations.has_native_head(), reason="this PyTorch has no F.linear_cross_entropy")
def test_pytorchs_fused_forms_agree():
    x, targets = torch.randn(30, 48, requires_grad=True), torch.randint(0, 131, (30,))
    weight = torch.randn(131, 48, requires_grad=True)
    for native, reference in (
        (implementations.native_linear_cross_entropy, kernels_reference("linear_cross_entropy")),
        (implementations.native_linear_log_probs, kernels_reference("linear_log_probs")),
    ):
        ratio = worst_ratio(
            lambda a, b, f=native: f(a, b, targets), lambda a, b, f=reference: f(a, b, targets), [x, weight]
        )
        assert ratio <= ALLOWED


def kernels_reference(name: str):
    from minimind.kernels.linear_cross_entropy import linear_cross_entropy_ref
    from minimind.kernels.linear_log_probs import linear_log_probs_ref

    if name == "linear_cross_entropy":
        return linear_cross_entropy_ref
    return lambda x, weight, targets: linear_log_probs_ref(x, weight, targets)[0]


def test_a_wrong_implementation_is_refused_and_a_failing_one_is_a_row():
    def dead(gate_up):
        raise NotImplementedError("not on this card\nat all")

    case = build("swiglu", "tiny", 40, torch.float32, CPU, compiled=False)
    wrong_value = lambda gate_up: 1.001 * case.reference(gate_up)  # noqa: E731
    wrong_gradient = lambda gate_up: _Tripled.apply(case.reference(gate_up))  # noqa: E731
    gone = lambda gate_up: case.reference(gate_up) * float("nan")  # noqa: E731
    others = {"wrong": wrong_value, "gradient": wrong_gradient, "gone": gone, "dead": dead}
    case = dataclasses.replace(case, implementations=case.implementations | others)
    rows = {(r.contender, r.phase): r for r in bench().rows(case, case)}
    assert len(rows) == 6 * len(PASSES)
    for which in PASSES:
        for name in ("wrong", "gradient"):
            refused = rows[name, which]
            assert refused.status == "refused" and refused.milliseconds is None and refused.ratio is None
            assert refused.error_ratio > ALLOWED and "2 is allowed" in refused.reason
        failed = rows["dead", which]
        assert failed.status == "failed" and failed.reason == "NotImplementedError: not on this card"
        for name in ("minimind", "eager"):
            timed = rows[name, which]
            assert timed.status == "ok" and timed.milliseconds > 0 and timed.runs == 2 and timed.reason == ""
            assert timed.p20 <= timed.milliseconds <= timed.p80 and timed.peak_mib is None
        ours, eager = rows["minimind", which], rows["eager", which]
        assert ours.ratio == 1.0 and eager.ratio == pytest.approx(eager.milliseconds / ours.milliseconds)
        assert rows["gone", which].status == "refused" and rows["gone", which].error_ratio is None


class _Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *grads):
        return 3 * grads[0]


def test_an_implementation_that_fails_in_its_turn_does_not_stop_the_others():
    turns = []

    def mortal(_):
        turns.append(1)
        if len(turns) == 3:
            raise RuntimeError("out of memory")

    timings = time_in_turns({"mortal": Step(lambda: None, mortal), "fine": Step(lambda: None, lambda _: None)}, CPU, 4)
    assert timings["mortal"] == "RuntimeError: out of memory" and len(turns) == 3
    assert timings["fine"].runs == 4


def test_every_backward_pass_has_an_untimed_forward_pass():
    calls = []

    def function(x):
        calls.append("forward")
        return _Spy.apply(x, calls)

    x = torch.randn(3, requires_grad=True)
    for which, expected in (("forward", ["forward"]), ("both", ["forward", "backward"])):
        step = pass_step(which, function, [x])
        state = step.prepare()
        calls.clear()
        step.run(state)
        assert calls == expected
    step = pass_step("backward", function, [x])
    for _ in range(2):
        calls.clear()
        state = step.prepare()
        assert calls == ["forward"]
        step.run(state)
        assert calls == ["forward", "backward"]


class _Spy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, calls):
        ctx.calls = calls
        return 2 * x

    @staticmethod
    def backward(ctx, *grads):
        ctx.calls.append("backward")
        return 2 * grads[0], None


def test_work_by_hand():
    def setting(preset):
        return KernelSetting(ModelConfig.preset(preset), 10, torch.bfloat16, CPU, False)

    small = setting("minimind2-small")
    assert norm_work(small, 1).forward == 2 * 10 * 512 * 2  # x in, y out, two bytes each
    assert norm_work(small, 1).backward == 3 * 10 * 512 * 2
    assert norm_work(small, 2).of_pass("both") == (4 + 4) * 10 * 512 * 2
    assert rope_work(small, False).forward == 2 * 10 * 12 * 64 * 2
    assert rope_work(setting("minimind3"), True).backward == (2 * 16 + 12) * 10 * 96 * 2
    assert swiglu_work(small).of_pass("both") == 8 * 10 * 1408 * 2
    assert head_work(small).forward == 65_536_000  # 2 x 10 x 512 x 6400
    assert head_work(small).of_pass("both") == 196_608_000
    assert head_work(small).of_pass("backward") is None  # the gradient was made before
    assert head_work(small, split=True).of_pass("backward") == 131_072_000
    assert head_work(small, teacher=True).of_pass("both") == 262_144_000
    assert moe_work(setting("minimind2-moe")).of_pass("both") == 18 * 10 * 2 * 640 * 1728


def test_rates_and_shares():
    case = build("swiglu", "tiny", 40, torch.float32, CPU, compiled=False)
    (ours,) = (r for r in bench().rows(case, case) if (r.contender, r.phase) == ("minimind", "both"))
    assert ours.rate == pytest.approx(8 * 40 * 40 * 4 / (ours.milliseconds / 1e3) / 1e9)
    assert ours.unit == "GB/s" and ours.share == pytest.approx(ours.rate / 10.0)


def test_rows_are_added_never_rewritten(tmp_path):
    path = tmp_path / "device" / "kernels.csv"
    append(path, [row(milliseconds=1 / 3)])
    before = path.read_text(encoding="utf-8")
    append(path, [row(contender="eager", reason="a, b"), row(status="refused")])
    after = path.read_text(encoding="utf-8")
    assert after.startswith(before)
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["contender"] for r in rows] == ["minimind", "eager", "minimind"]
    assert rows[0]["milliseconds"] == "0.333333" and rows[1]["reason"] == "a, b"


def test_changed_columns_are_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "kernels.csv"
    path.write_text(",".join(columns_of(KernelRow)[:-1]) + "\n", encoding="utf-8")
    for write in (lambda: append(path, [row()]), lambda: kernels.main(kernels.Args(device="cpu", out=str(tmp_path)))):
        with pytest.raises(ValueError, match=r"kernels\.csv: its columns .*error_ratio"):
            write()
    assert path.read_text(encoding="utf-8").count("\n") == 1


def test_a_table_that_cannot_be_written_is_an_error_before_anything_is_measured(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"kernels\.csv: cannot be written .*; name another folder with --out"):
        kernels.main(kernels.Args(device="cpu", out=str(tmp_path / "file" / "below")))


def test_main_writes_rows_and_a_picture(tmp_path, capsys):
    ops = ("rms_norm", "rope", "rope_qk_norm", "linear_cross_entropy", "moe")
    args = kernels.Args(
        ops=ops, presets=("tiny", "tiny-normed"), tokens=(32,), dtype="fp32", device="cpu", repeat=2, out=str(tmp_path)
    )
    outcome = kernels.main(args)
    json.dumps(outcome)
    assert "no GPU" in capsys.readouterr().out
    with Path(outcome["csv"]).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    # a norm of one size is timed once for both presets; so is the head; two routings are two cases
    assert len(rows) == len(outcome["rows"]) == 6 * len(PASSES) * 2
    assert {r["op"] for r in rows} == set(ops) and {r["status"] for r in rows} == {"ok"}
    picture = Path(outcome["png"]).read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


def test_a_picture_of_refusals_alone(tmp_path):
    rows = [row(status="refused"), row(contender="eager", status="failed"), row(op="moe", status="refused")]
    plot(rows, tmp_path / "kernels.png")
    assert (tmp_path / "kernels.png").stat().st_size > 1000


@pytest.mark.heavy
def test_last_line_is_json(tmp_path):
    flags = ("--ops", "swiglu", "--presets", "nano", "--tokens", "16", "--repeat", "1", "--device", "cpu")
    result = subprocess.run(
        [sys.executable, "bench/kernels.py", *flags, "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["csv"] == str(tmp_path / "kernels.csv")


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"ops": ("softmax",)}, "--ops softmax: unknown; choose from rms_norm"),
        ({"presets": ("gpt5",)}, "--presets gpt5: unknown"),
        ({"dtype": "int8"}, "--dtype int8: unknown; choose from auto, bf16"),
        ({"tokens": (0,)}, "--tokens 0: must be at least 1"),
        ({"repeat": 0}, "--repeat 0: must be at least 1"),
        ({"ops": ("moe",), "presets": ("minimind2",)}, "no model among --presets"),
        ({"tune": "rms_norm"}, "--tune rms_norm: needs a CUDA GPU"),
        ({"tune": "softmax"}, "--tune softmax: unknown"),
    ],
)
def test_bad_arguments(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        kernels.main(kernels.Args(**({"device": "cpu", "out": str(tmp_path)} | flags)))
    assert "\n" not in str(caught.value)


def test_tuning_reaches_every_number_of_every_table():
    assert tuning.TABLES.keys() == BUILDERS.keys() == tuning.FLOAT_TABLES.keys()
    for tables in (tuning.TABLES, tuning.FLOAT_TABLES):
        for module, attribute in {pair for pairs in tables.values() for pair in pairs}:
            table = getattr(pytest.importorskip(f"minimind.kernels.{module}"), attribute)
            for entry in table.values():
                for place in tuning.places(entry):
                    smaller, larger = (tuning.replaced(entry, place, c) for c in tuning.changes(place))
                    assert smaller != entry or larger != entry
                    assert type(smaller) is type(larger) is type(entry)


def test_tuning_keeps_faster_entries(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Config:
        elements: int
        num_warps: int

    def seconds(self, table, config):
        if config.num_warps > 8:
            return "too many"
        return 1.0 + abs(config.elements - 2048) / 4096 - config.num_warps / 100

    monkeypatch.setattr(tuning._Search, "seconds", seconds)
    search = tuning._Search([], [], 86, CPU, tuning.Console(quiet=True))
    table = {80: Config(elements=1024, num_warps=4)}
    best, ratio = search.run(table)
    assert best == Config(elements=2048, num_warps=8) and ratio < 1
    assert table == {80: Config(elements=1024, num_warps=4)}


def test_slug():
    assert slug("NVIDIA A100-SXM4-80GB, 79 GiB") == "nvidia-a100-sxm4-80gb-79-gib"
