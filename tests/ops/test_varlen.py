"""The choice of flash attention, with stand-ins, and with the real packages where they are installed."""

from types import ModuleType, SimpleNamespace

import pytest
import torch
from rich.console import Console

from minimind.ops import attention, varlen
from minimind.ops.varlen import PACKAGES, Bounds, Heads
from minimind.training.arguments import StageArgs
from minimind.training.job import Job
from tests.kernels.contract import DEVICE

HEADS = Heads(4, 2, 16, torch.bfloat16)
CPU = torch.device("cpu")


def attend(q, k, v, bounds):
    """Causal attention of documents in plain PyTorch."""
    parts = []
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        rows = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


class Machine:
    """A simulated GPU of this capability. installed: modules; fails: implementations that do not load, "wrong X" for
    wrong results, "heads" for no support of fewer key heads."""

    def __init__(self, monkeypatch, capability=(9, 0), installed=(), fails=(), takes_fewer_heads=True):
        self.active, self.calls, self.fails = None, [], fails
        monkeypatch.setattr(varlen, "why_none", lambda device, dtype: None)
        monkeypatch.setattr(varlen, "varlen_attn", self.operator)
        monkeypatch.setattr(varlen, "TAKES_FEWER_HEADS", takes_fewer_heads)
        monkeypatch.setattr(varlen, "_HAS_PAGES", True)
        for name in ("EXPAND", "PAGED", "_flash2", "_chosen"):  # put back afterwards
            monkeypatch.setattr(varlen, name, getattr(varlen, name))
        monkeypatch.setattr(varlen, "_installed", lambda module: module in installed)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        module = ModuleType("flash_attn")
        module.flash_attn_varlen_func = self.flash2
        monkeypatch.setitem(__import__("sys").modules, "flash_attn", module)
        for name, answer in (("activate", self.activate), ("restore", self.restore), ("current", lambda: self.active)):
            monkeypatch.setattr(torch.nn.attention, f"{name}_flash_attention_impl", answer, raising=False)
        varlen.detect_grouped_heads.cache_clear()

    def activate(self, name):
        if name in self.fails:
            raise RuntimeError(f"{name} was built for another torch\nand more")
        self.active = name

    def restore(self):
        self.active = None

    def operator(self, q, k, v, cu_q, cu_k, max_q, max_k, *, window_size, **options):
        self.calls.append(k.shape[1])
        if not varlen.TAKES_FEWER_HEADS:
            assert not options
            if "heads" in self.fails and k.shape[1] != q.shape[1]:
                raise ValueError("Expect query and key/value to have the same number of heads")
        out = attend(q, k, v, cu_q)
        return 2 * out if f"wrong {self.active}" in self.fails else out

    def flash2(self, q, k, v, cu_q, cu_k, max_q, max_k, causal):
        assert causal
        self.calls.append("flash2")
        return attend(q, k, v, cu_q)


ALL = [package.module for package in PACKAGES.values()]


@pytest.mark.parametrize(
    "capability, installed, expected, active",
    [
        ((9, 0), ALL, "FlashAttention 3", "FA3"),
        ((9, 0), ["flash_attn.cute.interface"], "FlashAttention 4", "FA4"),
        ((10, 0), ALL, "FlashAttention 4", "FA4"),
        ((8, 9), ALL, "FlashAttention 2 of PyTorch", None),
        ((12, 0), ALL, "FlashAttention 2 of PyTorch", None),
        ((9, 0), [], "FlashAttention 2 of PyTorch; FlashAttention 3 would be faster: flash_attn_inter", None),
    ],
)
def test_auto_takes_the_fastest_that_is_there(monkeypatch, capability, installed, expected, active):
    machine = Machine(monkeypatch, capability, installed)
    assert varlen.choose("auto", CPU, HEADS).startswith(f"attention: {expected}")
    assert machine.active == active


def test_a_package_that_does_not_work_is_skipped_and_reported(monkeypatch):
    machine = Machine(monkeypatch, installed=ALL, fails=("FA3", "wrong FA4"))
    line = varlen.choose("auto", CPU, HEADS)
    assert line.startswith(
        "attention: FlashAttention 2 of PyTorch; FlashAttention 3 would be faster: it does not load:"
    )
    assert line.endswith("FlashAttention 4 would be faster: it gives wrong results here") and "\n" not in line
    assert machine.active is None and varlen.PAGED


@pytest.mark.parametrize(
    "name, capability, installed, fails, message",
    [
        ("flash3", (8, 0), ALL, (), r"flash3: it supports compute capability 9\.x, and this GPU has 8\.0; use"),
        ("flash4", (9, 0), [], (), r"flash_attn\.cute\.interface is not installed \(pip install flash-attn-4\)"),
        ("flash3", (9, 0), ALL, ("FA3",), "it does not load: FA3 was built for another torch; use --attention torch"),
        ("flash4", (10, 0), ALL, ("wrong FA4",), "it gives wrong results here"),
    ],
)
def test_naming_one_that_does_not_work_is_an_error(monkeypatch, name, capability, installed, fails, message):
    machine = Machine(monkeypatch, capability, installed, fails)
    with pytest.raises(ValueError, match=message) as caught:
        varlen.choose(name, CPU, HEADS)
    assert "\n" not in str(caught.value) and machine.active is None


def test_flash2_is_called_instead_of_pytorchs_operator(monkeypatch):
    machine = Machine(monkeypatch, (8, 6), ALL)
    assert varlen.choose("flash2", CPU, HEADS) == "attention: FlashAttention 2 of flash-attn"
    assert machine.calls == ["flash2"] and varlen.chosen() == "flash2"
    assert varlen.choose("torch", CPU, HEADS) == "attention: FlashAttention 2 of PyTorch"
    assert varlen._flash2 is None and varlen.chosen() == "torch"


def test_flash4_has_no_pages_on_hopper(monkeypatch):
    Machine(monkeypatch, (9, 0), ALL)
    varlen.choose("flash4", CPU, HEADS)
    assert not varlen.PAGED
    varlen.choose("flash3", CPU, HEADS)
    assert varlen.PAGED


@pytest.mark.parametrize("fails", [(), ("heads",)])
def test_support_of_fewer_key_heads_is_detected_once(monkeypatch, fails):
    machine = Machine(monkeypatch, (8, 0), [], fails, takes_fewer_heads=False)
    for _ in range(2):
        varlen.choose("auto", CPU, HEADS)
    assert machine.calls == [2] and bool(fails) == varlen.EXPAND
    q, k, v = (torch.randn(5, heads, 16) for heads in (4, 2, 2))
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    out = varlen.causal_attention(q, k, v, Bounds(cu, cu, 3, 3))
    torch.testing.assert_close(out, attend(q, k, v, cu))
    assert machine.calls[-1] == (4 if fails else 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has the choice")
@pytest.mark.parametrize("name", ["torch", "flash2", "flash3", "flash4"])
def test_a_cpu_has_no_flash_attention(name):
    with pytest.raises(ValueError, match=f"--attention {name}: flash attention over documents needs a GPU"):
        Job.begin("pretrain", StageArgs(attention=name, device="cpu"), Console(quiet=True))
    with pytest.raises(ValueError, match=f"--attention {name}: not with --no-fused"):
        Job.begin("pretrain", StageArgs(attention=name, device="cpu", fused=False), Console(quiet=True))
    job = Job.begin("pretrain", StageArgs(device="cpu"), Console(quiet=True))
    assert job.attention == ""


def test_float32_has_no_flash_attention(monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", SimpleNamespace())
    reason = varlen.why_none(torch.device("cuda"), torch.float32)
    assert reason == "flash attention needs 16-bit numbers, and the run computes in torch.float32"


def test_an_old_gpu_has_no_flash_attention(monkeypatch):
    """Before compute capability 8.0, packed documents take a mask, in 16 bits too."""
    old, fp16 = torch.device("cuda"), torch.float16
    monkeypatch.setattr(varlen, "varlen_attn", SimpleNamespace())
    cu = torch.tensor([0, 3, 8])
    for capability, name in (((7, 5), "masked"), ((8, 0), "torch")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, c=capability: c)
        monkeypatch.setattr(torch.Tensor, "to", lambda self, *_: self)
        assert attention.attention_name(old, fp16, True) == name
        layout = attention._document_layout(old, fp16, cu, 8, fused=True)
        assert (layout is None) == (name == "masked")
        reason = varlen.why_none(old, fp16)
        assert (reason is None) == (name == "torch")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    heads = Heads(4, 2, 16, fp16)
    assert varlen.choose("auto", old, heads) == ""
    with pytest.raises(
        ValueError, match=r"--attention torch: flash attention needs compute capability 8.0, and .* 7.5"
    ):
        varlen.choose("torch", old, heads)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("size, groups", [(32, 2), (64, 2), (80, 2), (96, 4), (128, 2)])
@pytest.mark.parametrize("name", ["torch", *PACKAGES])
def test_each_computes_what_plain_attention_does(name, size, groups):
    reason = None if name == "torch" else varlen.why_not(name, DEVICE)
    if reason is not None:
        pytest.skip(reason)
    heads = Heads(8, groups, size, torch.bfloat16)
    try:
        varlen.choose(name, DEVICE, heads)
        assert varlen.problem(DEVICE, heads) is None
    finally:
        varlen.choose("torch", DEVICE, heads)
