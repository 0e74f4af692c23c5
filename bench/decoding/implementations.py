"""The greedy decoders that bench/decode.py compares, each with its best settings, all on the same weights.

ours            this project's engine, native ops, bf16 weights and cache
ours-int8       the same with 8-bit weights
ours-fp8        the same as ours with a float8 cache
ours-fp32       the same in float32
ours-reference  the engine without native ops: plain PyTorch, bf16
naive           this project's plain model with upstream's generate loop: float32, keys and values grown by torch.cat at
                every token, attention as matrix products
hf-dynamic      transformers' generate in bf16, DynamicCache, SDPA
hf-static       the same with StaticCache and its compiled forward
hf-dynamic-fp32 and
hf-static-fp32  the same in float32
llama.cpp-f16, llama.cpp-bf16, llama.cpp-q8_0, llama.cpp-f32
                llama.cpp through llama-cpp-python's low-level interface, a sequence for each row, the matrices in that
                type, key/value cache in f16 (for f32 in f32)
vllm            vLLM in bf16, in the Python that MINIMIND_BENCH_VLLM names, without its prefix cache

A decoder continues prompts of one length and reports the times at which the host knew its tokens.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from bench.common.models import transformers_model
from bench.common.naive import KeyValues, hidden_states
from bench.common.timing import peak_mib, synchronize
from bench.common.worker import Handler
from bench.decoding.llama_cpp import LlamaCpp
from bench.decoding.vllm_peer import VARIABLE, VllmProcess
from minimind import ops
from minimind.config import ModelConfig
from minimind.inference.decode.kv_cache import FLOAT8
from minimind.inference.engine import Engine
from minimind.inference.requests import Request, SamplingParams
from minimind.inference.runner import Backend
from minimind.modeling import Model
from minimind.ops import native
from minimind.rope import rope_cos_sin
from minimind.weights import load_model

Width = Literal["fp32", "bf16", "f16", "q8_0", "int8"]


@dataclass(frozen=True)
class DecodeSetting:
    """folder: config.json, model.safetensors and model-TYPE.gguf. A batch has `batch` prompts of `prompt` tokens, each
    continued by `new` tokens. max_context: the engine's longest sequence; None for prompt plus new."""

    folder: Path
    batch: int
    prompt: int
    new: int
    threads: int
    device: torch.device
    max_context: int | None = None

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_json(self.folder / "config.json")


@dataclass(frozen=True)
class Generation:
    """tokens [B][N]. stamps: for each step, seconds since the start and the number of rows that got a token. first:
    seconds until each row's first token, [B]."""

    tokens: list[list[int]]
    stamps: list[tuple[float, int]]
    first: list[float]


Decoder = Callable[[Tensor], Generation]


class Stopwatch:
    """Records the time of each step. It waits for the device first, unless the tokens are on the host already."""

    def __init__(self, device: torch.device, on_host: bool = False) -> None:
        self.device = torch.device("cpu") if on_host else device
        self.stamps: list[tuple[float, int]] = []
        self.start = time.perf_counter()

    def stamp(self, rows: int) -> float:
        """Seconds since the start, after a step that gave `rows` rows a token."""
        synchronize(self.device)
        self.stamps.append((time.perf_counter() - self.start, rows))
        return self.stamps[-1][0]

    def generation(self, tokens: list[list[int]]) -> Generation:
        """The result of a decoder whose rows all began together."""
        return Generation(tokens, self.stamps, [self.stamps[0][0]] * len(tokens))


def ours(
    s: DecodeSetting,
    dtype: torch.dtype,
    backend: Backend = "native",
    kv_dtype: torch.dtype | None = None,
    weights_dtype: torch.dtype | None = None,
) -> Decoder:
    room = s.batch * 256 * -(-(s.prompt + s.new) // 256)  # whole pages for every row, whatever their size
    engine = Engine(
        load_model(s.folder, device=s.device), None, dtype=dtype, kv_dtype=kv_dtype, weights_dtype=weights_dtype,
        backend=backend, max_batch=s.batch, max_context=s.max_context or s.prompt + s.new, kv_tokens=room,
        prefix_cache=False,
    )  # fmt: skip
    params = SamplingParams(max_new_tokens=s.new, temperature=0.0, ignore_eos=True)

    def run(prompts: Tensor) -> Generation:
        requests = [Request(row, params) for row in prompts.tolist()]
        first: dict[str, float] = {}
        watch = Stopwatch(s.device, on_host=True)  # the next step is launched already; do not wait for it
        tokens: dict[str, list[int]] = {engine.submit(request): [] for request in requests}
        while engine.has_work:
            deltas = [delta for delta in engine.step() if delta.token_ids]
            if not deltas:
                continue
            now = watch.stamp(len(deltas))
            for delta in deltas:
                tokens[delta.id].extend(delta.token_ids)
                first.setdefault(delta.id, now)
        return Generation(list(tokens.values()), watch.stamps, [first[name] for name in tokens])

    return run


def naive(s: DecodeSetting) -> Decoder:
    ops.set_mode("reference")
    model = load_model(s.folder, device=s.device)
    table = rope_cos_sin(model.config, torch.arange(s.prompt + s.new, device=s.device))

    def run(prompts: Tensor) -> Generation:
        watch = Stopwatch(s.device)
        past: KeyValues = [None] * len(model.layers)
        ids = inputs = prompts.to(s.device)
        for _ in range(s.new):
            inputs = naive_forward(model, inputs, past, table)[:, -1].argmax(dim=-1, keepdim=True)
            ids = torch.cat((ids, inputs), dim=1)
            watch.stamp(s.batch)
        return watch.generation(ids[:, s.prompt :].tolist())

    return run


def naive_forward(model: Model, ids: Tensor, past: KeyValues, table: tuple[Tensor, Tensor]) -> Tensor:
    """ids int64 [B, T] that follow the tokens in `past` -> logits [B, T, V]."""
    length = 0 if past[0] is None else past[0][0].shape[1]
    positions = torch.arange(length, length + ids.shape[1], device=ids.device).unsqueeze(0)
    return hidden_states(model, ids, past, table, positions) @ model.head_weight.t()


def hf(s: DecodeSetting, dtype: torch.dtype, static: bool) -> Decoder:
    from transformers import CompileConfig, GenerationConfig, StoppingCriteria, StoppingCriteriaList

    model = hf_model(s.folder, dtype).to(s.device)
    compiling = None
    if static and s.device.type == "cpu":  # transformers does not compile there by default
        compiling = CompileConfig(mode="default")
        setattr(compiling, "_compile_all_devices", True)  # noqa: B010
    options: dict[str, Any] = {"cache_implementation": "static", "compile_config": compiling} if static else {}
    config = GenerationConfig(
        do_sample=False, max_new_tokens=s.new, min_new_tokens=s.new, eos_token_id=None, pad_token_id=0, **options
    )
    watch = Stopwatch(s.device)

    class Clock(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            watch.stamp(s.batch)
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def run(prompts: Tensor) -> Generation:
        nonlocal watch
        watch = Stopwatch(s.device)
        out = model.generate(
            prompts.to(s.device),
            attention_mask=torch.ones_like(prompts, device=s.device),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([Clock()]),
        )
        return watch.generation(out[:, s.prompt :].tolist())

    return run


def hf_model(folder: Path, dtype: torch.dtype) -> Any:
    """transformers' model of this shape, with the weights of `folder`."""
    model = transformers_model(ModelConfig.from_json(folder / "config.json"))
    keys = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    different = set(keys.missing_keys) - {"lm_head.weight"} | set(keys.unexpected_keys)
    if different:
        raise ValueError(f"{folder}: transformers' model has other weights: {', '.join(sorted(different)[:3])}")
    model.tie_weights()
    return model.to(dtype).eval()


def llama_cpp(s: DecodeSetting, width: str) -> Decoder:
    decoder = LlamaCpp(s.folder / f"model-{width}.gguf", s.batch, s.prompt + s.new, s.threads, width == "f32")

    def run(prompts: Tensor) -> Generation:
        watch = Stopwatch(s.device)
        tokens = [decoder.prefill(prompts.numpy())]
        watch.stamp(s.batch)
        for _ in range(s.new - 1):
            tokens.append(decoder.step(tokens[-1]))
            watch.stamp(s.batch)
        return watch.generation(np.stack(tokens, axis=1).tolist())

    return run


class Vllm:
    """vLLM's engine, which admits and computes the rows as its scheduler likes."""

    def __init__(self, s: DecodeSetting) -> None:
        self.process = VllmProcess(s.folder / "hf", s.batch, s.prompt + s.new, s.threads, s.new)

    def __call__(self, prompts: Tensor) -> Generation:
        answer = self.process.decode(prompts.tolist())
        return Generation(answer["tokens"], [(time, rows) for time, rows in answer["stamps"]], answer["first"])


@dataclass(frozen=True)
class DecoderImplementation:
    """make: called once, in a process of its own. width: type of the matrices. kv_bytes: bytes of a number in the
    cache."""

    make: Callable[[DecodeSetting], Decoder]
    width: Width
    kv_bytes: int


IMPLEMENTATIONS: dict[str, DecoderImplementation] = {
    "ours": DecoderImplementation(lambda s: ours(s, torch.bfloat16), "bf16", 2),
    "ours-int8": DecoderImplementation(lambda s: ours(s, torch.bfloat16, weights_dtype=torch.int8), "int8", 2),
    "ours-fp8": DecoderImplementation(lambda s: ours(s, torch.bfloat16, kv_dtype=FLOAT8), "bf16", 1),
    "ours-fp32": DecoderImplementation(lambda s: ours(s, torch.float32), "fp32", 4),
    "ours-reference": DecoderImplementation(lambda s: ours(s, torch.bfloat16, "reference"), "bf16", 2),
    "hf-dynamic": DecoderImplementation(lambda s: hf(s, torch.bfloat16, False), "bf16", 2),
    "hf-static": DecoderImplementation(lambda s: hf(s, torch.bfloat16, True), "bf16", 2),
    "hf-dynamic-fp32": DecoderImplementation(lambda s: hf(s, torch.float32, False), "fp32", 4),
    "hf-static-fp32": DecoderImplementation(lambda s: hf(s, torch.float32, True), "fp32", 4),
    "llama.cpp-f16": DecoderImplementation(lambda s: llama_cpp(s, "f16"), "f16", 2),
    "llama.cpp-bf16": DecoderImplementation(lambda s: llama_cpp(s, "bf16"), "bf16", 2),
    "llama.cpp-q8_0": DecoderImplementation(lambda s: llama_cpp(s, "q8_0"), "q8_0", 2),
    "llama.cpp-f32": DecoderImplementation(lambda s: llama_cpp(s, "f32"), "fp32", 4),
    "vllm": DecoderImplementation(Vllm, "bf16", 2),
    "naive": DecoderImplementation(naive, "fp32", 4),
}


def start(name: str, setting: DecodeSetting) -> Handler:
    """The function that a worker process answers with: prompts [B][P] -> their Generation; None -> the peak memory in
    MiB."""
    torch.set_num_threads(setting.threads)
    with torch.inference_mode():
        decode = IMPLEMENTATIONS[name].make(setting)

    def answer(prompts: list[list[int]] | None) -> Any:
        if prompts is None:
            return decode.process.peak_mib() if isinstance(decode, Vllm) else peak_mib(setting.device)
        with torch.inference_mode():
            return decode(torch.tensor(prompts))

    return answer


def why_not(name: str, config: ModelConfig, device: torch.device) -> str | None:
    """None if this decoder can run here, else one short reason."""
    if name.startswith("hf"):
        if importlib.util.find_spec("transformers") is None:
            return "transformers is not installed"
        if config.num_experts:
            return "transformers stacks and routes experts in its own way; dense models only"
        if config.rope_scaling is not None:
            return "models with rope scaling are not converted for transformers"
    if name.startswith("llama.cpp"):
        if importlib.util.find_spec("llama_cpp") is None:
            return "llama-cpp-python is not installed"
        if device.type != "cpu":
            return "built for the CPU only"
    if name == "vllm":
        if not os.environ.get(VARIABLE):
            return f"{VARIABLE} names no Python that has it"
        if device.type != "cpu":
            return "its CPU package is compared"
    if name in ("ours", "ours-int8", "ours-fp8", "ours-fp32"):
        return native.why_not(device)
    return None
