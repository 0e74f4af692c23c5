"""NVTX ranges of spans: from the nvtx package if it is installed, else from torch.cuda.nvtx; none when off."""

import sys
from types import SimpleNamespace

import pytest
import torch

from minimind.training.profiling import mark_blocks
from minimind.utils import spans


@pytest.fixture(autouse=True)
def _forget_the_package():
    look = spans._nvtx_package
    look.cache_clear()
    yield
    look.cache_clear()


@pytest.fixture
def on(monkeypatch):
    monkeypatch.setattr(spans._state, "nvtx", True)


@pytest.fixture
def package(monkeypatch) -> list[tuple]:
    """The calls to a stand-in for the nvtx package."""
    told: list[tuple] = []

    class Annotate:
        def __init__(self, message, color=None, domain=None, category=None, payload=None):
            self.range = (domain, category, message)

        def __enter__(self):
            told.append(("push", *self.range))

        def __exit__(self, *_):
            told.append(("pop", *self.range))

    monkeypatch.setitem(sys.modules, "nvtx", SimpleNamespace(annotate=Annotate))
    return told


@pytest.fixture
def cuda_ranges(monkeypatch) -> list[str]:
    """The calls to torch.cuda.nvtx without the package."""
    told: list[str] = []
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: told.append(f"push {name}"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: told.append("pop"))
    return told


def test_ranges_have_a_domain_and_a_category(package, on):
    assert not torch.cuda.is_initialized()
    with spans.span("step 7"), spans.span("forward"), spans.span("block 3"):
        pass
    forward, block = ("minimind", "forward", "forward"), ("minimind", "forward", "block 3")
    step = ("minimind", "step", "step 7")
    assert package == [
        ("push", *step),
        ("push", *forward),
        ("push", *block),
        ("pop", *block),
        ("pop", *forward),
        ("pop", *step),
    ]


def test_a_range_ends_when_its_code_raises(package, on):
    with pytest.raises(KeyError), spans.span("optimizer"):
        raise KeyError
    assert [what for what, *_ in package] == ["push", "pop"]


@pytest.mark.parametrize(
    "name, category",
    [("data", "data"), ("loss", "forward"), ("backward", "backward"), ("optimizer", "optimizer"),
     ("communication", "communication"), ("plan", "decode"), ("decode", "decode"), ("sample", "decode")],
)  # fmt: skip
def test_categories_are_phases(name, category):
    assert spans.category(name) == category


def test_without_the_package_ranges_are_those_of_torch(cuda_ranges, on, monkeypatch):
    with spans.span("forward"):
        pass
    assert not cuda_ranges, "CUDA has not started"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with spans.span("forward"), spans.span("block 0"):
        pass
    assert cuda_ranges == ["push forward", "push block 0", "pop", "pop"]


def test_off_neither_imports_nor_marks(package, monkeypatch):
    monkeypatch.setattr(spans, "_nvtx_package", lambda: pytest.fail("imported while off"))
    with spans.span("forward"):
        pass
    assert not package


def test_compiled_blocks_have_no_ranges_and_no_graph_break(package, on):
    model = torch.nn.Sequential()
    model.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
    model.forward = lambda x: model.layers[1](model.layers[0](x))
    mark_blocks(model)
    torch.compile(model, backend="eager", fullgraph=True)(torch.ones(1, 4))
    assert not package
    model(torch.ones(1, 4))
    assert [name for what, *_, name in package if what == "push"] == ["block 0", "block 1"]


def test_the_package_itself(on):
    """Without a tool attached, its ranges do nothing, but PyTorch's profiler still has the spans."""
    pytest.importorskip("nvtx", reason="needs nvtx: pip install nvtx")
    with torch.profiler.profile() as recorded, spans.span("step 1"), spans.span("forward"):
        torch.ones(2).sum()
    assert {"step 1", "forward"} <= {event.key for event in recorded.key_averages()}
