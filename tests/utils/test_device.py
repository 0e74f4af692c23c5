import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from minimind import ops
from minimind.ops import varlen
from minimind.ops.attention import attention_name
from minimind.training.arguments import StageArgs
from minimind.training.job import Job
from minimind.utils import device
from minimind.utils.device import choose_device, choose_precision

ROOT = Path(__file__).parents[1]


def test_precision_says_why(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(device.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr(device, "_onednn_takes_bf16", lambda: True)
    native = choose_precision(cpu)
    assert native.compute_dtype == torch.bfloat16 and "AVX512-BF16" in str(native)
    monkeypatch.setattr(device, "_onednn_takes_bf16", lambda: False)
    limited = choose_precision(cpu)
    assert limited.compute_dtype == torch.float32 and "ONEDNN_MAX_CPU_ISA keeps oneDNN" in str(limited)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    plain = choose_precision(cpu)
    assert plain.compute_dtype == torch.float32
    assert str(plain) == "fp32 master weights, fp32 compute (PyTorch reports no bf16 instructions on this CPU)"
    assert "slow" in str(choose_precision(cpu, "bf16"))
    assert choose_precision(cpu, "fp32").compute_dtype == torch.float32
    half = choose_precision(cpu, "fp16")
    assert half.compute_dtype == torch.float16 and half.name == "fp16"
    assert str(half) == "fp32 master weights, fp16 compute, dynamic loss scaling (set by --precision; slow on a CPU)"


def test_precision_on_arm(monkeypatch):
    """bf16 where the processor has the instructions and oneDNN uses them, as PyTorch or an older one's Linux says."""
    cpu = torch.device("cpu")
    features = ["processor : 0", "Features : fp asimd bf16 i8mm"]
    monkeypatch.setattr(device.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(device, "_cpuinfo", lambda: features)
    for found in ({"architecture": "arm64", "bf16": True}, {}):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        native = choose_precision(cpu)
        assert native.compute_dtype == torch.bfloat16 and "this CPU has ARM's bf16 instructions" in str(native)
    monkeypatch.setattr(device.torch.ops, "mkldnn", object())  # as in a PyTorch without oneDNN
    without = choose_precision(cpu)
    assert without.compute_dtype == torch.float32 and "PyTorch's oneDNN does not use them" in str(without)
    monkeypatch.undo()
    monkeypatch.setattr(device.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(device, "_cpuinfo", lambda: features)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": False}, raising=False)
    old = choose_precision(cpu)
    assert old.compute_dtype == torch.float32 and "no bf16 instructions" in str(old)


def test_onednn_says_when_it_may_not_use_bf16():
    code = "from minimind.utils import device; print(device._onednn_takes_bf16())"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert answer.stdout == "False\n", answer.stderr


@pytest.mark.parametrize(
    ("capability", "dtype"), [((6, 1), torch.float32), ((7, 5), torch.float16), ((8, 6), torch.bfloat16)]
)
def test_precision_of_a_gpu(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_precision(torch.device("cuda")).compute_dtype == dtype


def test_auto_takes_a_gpu_when_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto").type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == "cpu"
    with pytest.raises(ValueError, match="use --device cpu"):
        choose_device("cuda")


def test_an_apple_gpu_is_taken_when_named(monkeypatch):
    """It runs the reference in float32. Nobody has tried that on such a machine, and the run says so."""
    with pytest.raises(ValueError, match="--device mps: PyTorch sees no Apple GPU here; use --device cpu"):
        choose_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto").type == "cpu"
    mps = choose_device("mps")
    assert choose_precision(mps).compute_dtype == torch.float32
    assert ops.describe(mps) == "ops: fused = reference on mps, where nobody has tried this program yet"
    assert attention_name(mps, torch.float32, True) == "masked"
    assert varlen.choose("auto", mps, varlen.Heads(4, 2, 16, torch.float32)) == ""
    assert "Apple GPU" in device.describe_device(mps)


def test_a_hidden_processor_is_named_by_its_family(monkeypatch):
    """As /proc/cpuinfo has it for two processors, the second of which would say something else."""
    lines = ["processor\t: 0", "cpu family\t: 25", "model\t\t: 17", "model name\t: AMD EPYC",
             "processor\t: 1", "cpu family\t: 26", "model\t\t: 2", "model name\t: B"]  # fmt: skip
    monkeypatch.setattr(device, "_cpuinfo", lambda: lines)
    cpu = torch.device("cpu")
    assert device.describe_device(cpu).startswith("AMD EPYC family 25 model 17, ")
    monkeypatch.setattr(device, "_cpuinfo", lambda: [line.replace("EPYC", "EPYC 9654") for line in lines])
    assert device.describe_device(cpu).startswith("AMD EPYC 9654, ")


def test_a_run_keeps_long_sums_in_float32():
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = True
    try:
        Job.begin("pretrain", StageArgs(device="cpu"), Console(quiet=True))
        assert not matmul.allow_bf16_reduced_precision_reduction
        assert not matmul.allow_fp16_reduced_precision_reduction
    finally:
        matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction = before


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the compiler is needed")
def test_a_start_without_a_gpu_does_not_import_the_compiler():
    """It would add 1.5 s to every start, including `minimind chat` and --help."""
    code = (
        "import sys, torch, minimind.inference.engine, minimind.training.job\n"
        "from minimind import ModelConfig; from minimind.modeling import Model\n"
        "with torch.device('meta'): Model(ModelConfig(64, 2, 4, 2, 16, 128, tie_word_embeddings=False))\n"
        "print([m for m in ('torch._dynamo', 'torch.nn.attention.varlen') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr
