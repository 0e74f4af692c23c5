"""Shared fixtures. Nothing here needs a GPU or the network; OMP_NUM_THREADS=2 runs the tests on two threads each."""

import os
import sys
from collections import Counter

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait take the other worker's core

import pytest
import torch

if not torch.cuda.is_available():  # before Triton is imported: its kernels then run in the interpreter
    os.environ["TRITON_INTERPRET"] = "1"

if "OMP_NUM_THREADS" not in os.environ:  # small shapes gain nothing from a second thread and wait for it
    torch.set_num_threads(1)

import torch._dynamo  # before memory is poisoned below: its table of functions must hold PyTorch's own

with torch.device("meta"):  # and so must that of the functions which take the device of such a block
    torch.empty(0)

from minimind import ops
from minimind.kernels.triton_support import triton
from tests import (
    pictures,
    sum_order,  # noqa: F401  asked for by an environment variable, it shuffles the sums of products
)

pictures.skip_rendering()

for _name in ("http_proxy", "https_proxy", "all_proxy"):  # tests talk to servers of this machine
    for _spelling in (_name, _name.upper()):
        os.environ.pop(_spelling, None)


@pytest.fixture(autouse=True)
def _restore_ops_mode():
    """A test may switch implementations; the next one starts from the default."""
    mode = ops.get_mode()
    yield
    ops.set_mode(mode)


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch):
    """Memory that this package's own code takes without filling holds NaN, so that a forgotten write shows."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))


@pytest.fixture
def rendered(monkeypatch):
    """The test's own process renders the pictures of training runs."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", pictures.render)


def _poisoned(original):
    def wrapper(*args, **kwargs):
        tensor = original(*args, **kwargs)
        if torch.compiler.is_compiling():
            return tensor
        ours = "minimind" in sys._getframe(1).f_globals.get("__name__", "")
        return tensor.fill_(float("nan")) if ours and tensor.is_floating_point() and not tensor.is_meta else tensor

    return wrapper


@pytest.fixture(params=["reference", "fused", pytest.param("kernels", marks=pytest.mark.slow)])
def ops_mode(request) -> str:
    if request.param == "kernels" and triton is None:
        pytest.skip("install minimind[gpu]: needs Triton")
    ops.set_mode(request.param)
    return request.param


def documents_batch(lengths: list[list[int]], length: int, vocab: int, seed: int = 0):
    """Random packed rows: (input_ids [B, T], cu_seqlens) for the documents' lengths in each row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (len(lengths), length), generator=generator)
    boundaries = [0]
    for row, docs in enumerate(lengths):
        assert sum(docs) == length
        for n in docs:
            boundaries.append(boundaries[-1] + n)
        assert boundaries[-1] == (row + 1) * length
    return ids, torch.tensor(boundaries, dtype=torch.int32)


def routing_of(expert_ids: torch.Tensor, gates: torch.Tensor, experts: int) -> ops.Routing:
    """A Routing that sends token t to expert_ids[t, k] with gates[t, k]; no scores, no counts."""
    order, inverse, offsets = ops._sort_copies(expert_ids, experts)
    return ops.Routing(gates, expert_ids, gates.new_empty(0), order, inverse, offsets, offsets.new_empty(0))


def pytest_terminal_summary(terminalreporter):
    """Print the skipped tests, a line for each reason."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple)
    )
    if reasons:
        terminalreporter.section(f"skipped here: {reasons.total()}")
    for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0])):
        terminalreporter.write_line(f"{count:4d}  {reason}")


def pytest_collection_modifyitems(items):
    """Run the folder with the longest tests first, so that no worker begins a long test when the others are done."""
    items.sort(key=lambda item: "tests/training/" not in item.nodeid)
