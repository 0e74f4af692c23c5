"""Spans cost nothing when off; a recorded step is a trace, a picture and a table."""

import gzip
import io
import json

import pytest
import torch
from matplotlib.image import imread
from rich.console import Console

from minimind.config import ModelConfig
from minimind.modeling import Model
from minimind.objectives.next_token import TokenBatch, next_token_loss
from minimind.training.profiling import StepProfiler, busy_ms, draw, mark_blocks, ranked, read_trace, show
from minimind.utils.spans import _OFF, _state, record, span

TINY = ModelConfig(
    vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    intermediate_size=48,
)  # fmt: skip


class Run:
    """Steps of a tiny model as the training loop drives the profiler."""

    def __init__(self, folder, first: int = 2, steps: int = 3) -> None:
        self.text = io.StringIO()
        self.model, self.number = Model(TINY), 0
        self.handles = mark_blocks(self.model)
        self.profiler = StepProfiler(folder, Console(file=self.text, width=120), first, steps)

    def step(self) -> None:
        self.number += 1
        self.profiler.begin(self.number)
        with span("data"):
            ids = torch.randint(0, TINY.vocab_size, (4, 64))
        with span("forward"):
            loss = self.model(ids).logits.square().mean()
        with span("backward"):
            loss.backward()
        self.profiler.end()


def names_in(path) -> list[str]:
    with gzip.open(path, "rt") as file:
        return [row["name"] for row in json.load(file)["traceEvents"]]


def test_spans_are_one_shared_object_when_off():
    assert span("forward") is span("backward")
    with span("forward"), span("forward"):
        pass


def test_three_steps(tmp_path):
    run = Run(tmp_path / "profile")
    for _ in range(6):
        run.step()
    run.profiler.close()
    assert span("after") is _OFF

    trace = read_trace(tmp_path / "profile" / "trace.json.gz")
    assert [step.name for step in trace.steps] == ["step 2", "step 3", "step 4"]
    spans = trace.of("span")
    assert [e.name for e in spans[:6]] == ["step 2", "data", "forward", "block 0", "block 1", "backward"]
    assert [e.depth for e in spans[:6]] == [0, 1, 1, 2, 2, 1]
    forward = spans[2]
    assert all(forward.start <= e.start and e.end <= forward.end for e in spans[3:5])
    assert forward.self_ms == pytest.approx(forward.length - spans[3].length - spans[4].length)
    busy = sum(event.self_ms for event in trace.of("operator"))
    assert busy == pytest.approx(busy_ms(trace.of("operator")), rel=1e-3)
    assert max(size for _, size in trace.memory) > 0

    table = run.text.getvalue()
    assert "aten::mm" in table and "blocks" in table and "no operator running" in table
    pixels = imread(tmp_path / "profile" / "timeline.png")[..., :3]
    assert pixels.shape[1] >= 1000
    assert len({tuple(colour) for colour in pixels[::4, ::4].reshape(-1, 3).round(1)}) > 10


@pytest.mark.parametrize("steps", [3, 5])
def test_a_short_run_shows_what_there_is(tmp_path, steps):
    run = Run(tmp_path, first=2, steps=steps)
    for _ in range(3):
        run.step()
    run.profiler.begin(4)  # and then the step failed
    run.profiler.close()
    run.profiler.close()
    assert "step 4" in names_in(tmp_path / "trace.json.gz")
    assert run.text.getvalue().count("timeline.png") == 1 and span("after") is _OFF

    early = Run(tmp_path / "early", first=3)
    early.step()
    early.profiler.close()
    assert "this process ended before its step 3" in early.text.getvalue() and not (tmp_path / "early").exists()


def test_nvtx_mode_turns_spans_on_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(_state, "nvtx", True)
    assert span("forward") is not _OFF
    run = Run(tmp_path / "nothing", first=1, steps=2)
    with torch.profiler.profile() as recorded:
        for _ in range(3):
            run.step()
    run.profiler.close()
    assert {"data", "forward", "block 0", "block 1"} <= {event.key for event in recorded.key_averages()}
    assert not (tmp_path / "nothing").exists() and not run.text.getvalue()


def test_the_head_and_its_loss_are_a_span_behind_the_blocks():
    model, ids = Model(TINY), torch.zeros(1, 8, dtype=torch.int64)
    mark_blocks(model)
    record(True)
    try:
        with torch.profiler.profile() as recorded:
            next_token_loss(model, TokenBatch(ids, ids, torch.tensor([0, 8], dtype=torch.int32), 8))
    finally:
        record(False)
    found = {e.name: e.time_range for e in recorded.events() if e.name in ("block 0", "block 1", "loss")}
    assert found["block 0"].end <= found["block 1"].start < found["block 1"].end <= found["loss"].start


def test_compiled_blocks_have_no_graph_break():
    model = torch.nn.Sequential()
    model.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
    model.forward = lambda x: model.layers[1](model.layers[0](x))
    handles = mark_blocks(model)
    record(True)
    try:
        with torch.profiler.profile() as recorded:
            torch.compile(model, backend="eager", fullgraph=True)(torch.ones(1, 4))
            model(torch.ones(1, 4))
    finally:
        record(False)
    blocks = [event.name for event in recorded.events() if event.name.startswith("block")]
    assert blocks == ["block 0", "block 1"]  # the second call's, which was not compiled
    for handle in handles:
        handle.remove()
    assert not model.layers[0]._forward_hooks and not model.layers[0]._forward_pre_hooks


def test_a_block_that_raises_closes_its_span():
    model = torch.nn.Sequential()
    model.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
    mark_blocks(model)
    record(True)
    try:
        with torch.profiler.profile() as recorded:
            with pytest.raises(RuntimeError), span("forward"):
                model.layers[0](torch.ones(1, 5))
            with span("after"):
                pass
    finally:
        record(False)
    spans = {e.name: e for e in recorded.events() if e.name in ("forward", "block 0", "after")}
    assert spans["block 0"].time_range.end <= spans["forward"].time_range.end <= spans["after"].time_range.start


def test_a_trace_of_a_gpu(tmp_path):
    """Written by hand: two streams, a gap, the host ahead of the device."""

    def row(cat, name, pid, tid, start, length):
        return {"ph": "X", "cat": cat, "name": name, "pid": pid, "tid": tid, "ts": 1e9 + start, "dur": length}

    rows = [
        row("user_annotation", "step 7", 1, 1, 0, 8000),
        row("user_annotation", "forward", 1, 1, 1000, 2000),
        row("user_annotation", "communication", 1, 2, 4000, 900),
        row("user_annotation", "nccl:all_reduce", 1, 2, 4100, 600),
        row("user_annotation", "FSDP::all_gather (layers.3)", 1, 1, 1100, 50),
        row("cpu_op", "aten::mm", 1, 1, 1500, 100),
        row("cpu_op", "MmBackward0", 1, 2, 4000, 100),
        row("gpu_user_annotation", "forward", 0, 7, 2000, 4000),
        row("kernel", "void gemm<long>", 0, 7, 2000, 3000),
        row("gpu_memcpy", "Memcpy HtoD", 0, 9, 4000, 2000),
        row("kernel", "triton_poi_0" + 80 * "x", 0, 7, 7000, 1000),
        {"ph": "i", "name": "[memory]", "ts": 1e9, "args": {"Device Type": 1, "Total Allocated": 1 << 20}},
        {"ph": "i", "name": "[memory]", "ts": 1e9, "args": {"Device Type": 0, "Total Allocated": 5}},
    ]
    with gzip.open(tmp_path / "trace.json.gz", "wt") as file:
        json.dump({"traceEvents": rows}, file)
    trace = read_trace(tmp_path / "trace.json.gz")
    assert [name for name, _ in ranked(trace.work)] == ["void gemm<long>", "Memcpy HtoD", "triton_poi_0" + 80 * "x"]
    assert busy_ms(trace.work) == pytest.approx(5.0)  # of 8: the copy is half hidden behind the product
    assert trace.memory == [(0.0, 1.0)]
    text = io.StringIO()
    show(trace, Console(file=text, width=120))
    table = [line.replace("│", " ").split() for line in text.getvalue().splitlines()]
    (idle,) = (line for line in table if line[:3] == ["no", "kernel", "running"])
    assert idle[3:5] == ["3.00", "37.5%"]
    spans_shown = {
        line[0]: line for line in table if line and line[0] in ("forward", "communication", "FSDP::all_gather")
    }
    assert spans_shown["forward"][1] == "2.00" and spans_shown["forward"][-1] == "4.00"  # on the host, on the GPU
    assert spans_shown["communication"][1] == "0.90"  # the collective lies within our own span
    assert "nccl" not in text.getvalue()
    show(trace, Console(file=(narrow := io.StringIO()), width=80))
    assert "ms a step │ of a step │ calls a step" in narrow.getvalue().replace("┃", "│")
    assert "FSDP::all_gather" in spans_shown, "without its layer"
    draw(trace, tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").stat().st_size > 10_000


@pytest.mark.parametrize("first, steps", [(0, 3), (3, 0)])
def test_bad_steps(tmp_path, first, steps):
    with pytest.raises(ValueError, match=f"first={first} and steps={steps} must both be at least 1"):
        StepProfiler(tmp_path, Console(), first, steps)
