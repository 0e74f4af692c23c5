"""Program that compares a model whose kernels are launched by generated code with the reference; see test_compiled.py.

Inductor generates code as on a GPU, tracing into the operators, and the code runs on CPU tensors: each Triton launch is
interpreted with the arguments, grid and constants of the generated code. Everything is compiled before anything is
interpreted, since the interpreter replaces the language that Triton's compiler reads.
"""

# ruff: noqa: E402 - the form of the operators is chosen before they are imported

import contextlib
import os
import sys
from unittest import mock

import torch

os.environ.pop("TRITON_INTERPRET", None)
from bench.compilation import host_stub
from bench.compilation.capture import pretending
from minimind.kernels import triton_support

host_stub.import_ops(visible=True)

import triton.language as language
from torch._dynamo.device_interface import CpuInterface
from torch._inductor import config as settings
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from minimind import ModelConfig, ops
from minimind.modeling import Model

SHAPE = dict(hidden_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=20,
             intermediate_size=72, vocab_size=97)  # fmt: skip
SHAPES = {
    "dense": SHAPE,
    "experts": SHAPE | dict(qk_norm=True, num_experts=4, num_experts_per_tok=2, num_shared_experts=1,
                            moe_intermediate_size=40, router_aux_loss_coef=0.1),
}  # fmt: skip
STANDARD = [
    (module, name, InterpretedFunction(function.fn))
    for module in (language, language.standard)
    for name, function in list(vars(module).items())
    if isinstance(function, JITFunction)
]


LAUNCHED: set[str] = set()


class Launcher:
    running = False  # otherwise a launch does nothing

    def __init__(self, _: AsyncCompile, name: str, source: str, device_str: str = "cpu") -> None:
        self.name, self.source, self.kernel = name, source, None

    def run(self, *arguments, stream) -> None:
        if not Launcher.running:
            return
        if self.kernel is None:
            with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
                self.kernel = getattr(PyCodeCache.load(self.source), self.name)
        meta = self.kernel.inductor_meta
        grid_size = len(meta["extra_launcher_args"])
        names = [n for n in self.kernel.fn.arg_names if n not in meta["declared_constexpr_names"]]
        given = dict(zip(names, arguments[:-grid_size], strict=True)) | self.kernel.triton_meta["constants"]
        with contextlib.ExitStack() as stack:
            for module, name, function in STANDARD:
                stack.enter_context(mock.patch.object(module, name, function))
            self.kernel.fn[arguments[-grid_size:]](**given)
        LAUNCHED.add(self.name)


def step(model: Model, run: Model, mode: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 97, (1, 32), generator=torch.Generator().manual_seed(0))
    bounds, mask = torch.tensor([0, 1, 20, 32], dtype=torch.int32), torch.ones_like(ids)
    model.zero_grad()
    with ops.using(mode):
        out = run(ids, cu_seqlens=bounds, attention_mask=mask)
        (out.logits.square().mean() + out.aux_loss).backward()
    return {"logits": out.logits.detach(), **{n: p.grad.clone() for n, p in model.named_parameters()}}


def main(shape: str, recompute: bool) -> None:
    torch.manual_seed(0)
    model = Model(ModelConfig(**SHAPES[shape]))
    model.recompute = recompute
    with torch.no_grad():
        for parameter in model.parameters():  # larger than at initialisation, so that mistakes show
            parameter.add_(torch.randn_like(parameter) * 0.1)
    expected = step(model, model, "reference")
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    with (
        settings.patch({"compile_threads": 1, "force_disable_caches": True}),
        mock.patch.object(CpuInterface, "raise_if_triton_unavailable", lambda device=None: None),
        mock.patch.object(AsyncCompile, "triton", lambda *given, **how: Launcher(*given, **how)),
        pretending(80, triton_support._launch),
    ):
        step(model, compiled, "kernels")
        Launcher.running = True
        found = step(model, compiled, "kernels")
    for name, value in expected.items():
        off = ((found[name] - value).abs().max() / value.abs().max()).item()
        assert off < 1e-5, f"{name} is off by {off:.1e} of its largest number"
    print(*sorted(LAUNCHED))


if __name__ == "__main__":
    main(sys.argv[1], recompute=sys.argv[2] == "recompute")
