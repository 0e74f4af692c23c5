"""The training steps that bench/throughput.py drives, each as its own project would run it at its best.

ours            train/pretrain.py --compile --fused: packed rows, the device's precision, no logits, fused AdamW
ours-eager      the same without --compile
eager           this project's plain PyTorch model on the same packed rows and in the same precision, full logits
compile         that under torch.compile
upstream-style  the plain model as upstream MiniMind trains it: one document a row, padded to --seq-len, full logits,
                mean over unmasked tokens, plain AdamW; autocast to bf16 on a GPU, float32 on a CPU
hf              transformers' LlamaForCausalLM on such rows: float32 weights under bf16 autocast, SDPA, torch.compile,
                fused AdamW
hf-bf16         the same with weights, gradients and AdamW in bf16: faster, and not the same training
liger           hf with Liger-Kernel's RMSNorm, RoPE, SwiGLU and fused cross-entropy (a GPU only)
"""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minimind import ops
from minimind.config import ModelConfig
from minimind.data.loader import PackedLoader
from minimind.data.store import Corpus
from minimind.modeling import Model
from minimind.objectives.next_token import next_token_loss
from minimind.training.batches import DeviceBatches
from minimind.training.compiling import compile_model
from minimind.training.device import choose_precision
from minimind.training.optim import OptimizerName, build_optimizers


@dataclass(frozen=True)
class Setting:
    preset: str
    corpus: Corpus
    rows: int
    seq_len: int
    optimizer: OptimizerName
    device: torch.device

    @property
    def positions(self) -> int:
        return self.rows * self.seq_len


@dataclass
class Contender:
    """step() trains once and returns how many real tokens it learnt from; loading: seconds spent so far on waiting for
    data; compiled: whether torch.compile is in it."""

    step: Callable[[], int]
    compiled: bool = False
    loading: float = 0.0

    @contextlib.contextmanager
    def waits_for_data(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.loading += time.perf_counter() - start


def ours(s: Setting, compiled: bool) -> Contender:
    ops.set_mode("fused")
    model = _model(s)
    trained = compile_model(model) if compiled else model
    optimizer = build_optimizers(model, s.optimizer, 1e-4, 0.1)
    batches = DeviceBatches(PackedLoader(s.corpus, s.seq_len, s.rows, seed=0), s.device)

    def step() -> int:
        with me.waits_for_data():
            batch = batches.next_batch()
        loss, aux = next_token_loss(trained, batch)
        (loss / batch.num_targets + aux).backward()
        batches.fetch()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return batch.num_targets

    me = Contender(step, compiled)
    return me


def plain(s: Setting, compiled: bool) -> Contender:
    ops.set_mode("reference")
    model = _model(s)
    trained = compile_model(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    batches = DeviceBatches(PackedLoader(s.corpus, s.seq_len, s.rows, seed=0), s.device)

    def step() -> int:
        with me.waits_for_data():
            batch = batches.next_batch()
        out = trained(batch.input_ids, cu_seqlens=batch.cu_seqlens, attention_mask=batch.targets.ne(-100))
        logits = out.logits.flatten(0, 1).float()
        loss = F.cross_entropy(logits, batch.targets.flatten(), reduction="sum") / batch.num_targets
        (loss + out.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return batch.num_targets

    me = Contender(step, compiled)
    return me


def upstream_style(s: Setting) -> Contender:
    ops.set_mode("reference")
    torch.manual_seed(0)
    model = Model(ModelConfig.preset(s.preset)).to(s.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    rows = _padded_rows(s)
    if s.device.type == "cuda":
        model.compute_dtype = torch.bfloat16

    def step() -> int:
        with me.waits_for_data():
            inputs, targets, weights, real = next(rows)
        out = model(inputs)
        logits = out.logits.flatten(0, 1).float()
        loss = F.cross_entropy(logits, targets.flatten(), reduction="none")
        ((loss * weights.flatten()).sum() / weights.sum() + out.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return real

    me = Contender(step)
    return me


def hf(s: Setting, pure: bool = False, liger: bool = False) -> Contender:
    model = _llama(s, liger).to(s.device, torch.bfloat16 if pure else torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    rows = _padded_rows(s)
    autocast = torch.autocast(s.device.type, torch.bfloat16, enabled=not pure)
    # Liger's loss takes the labels and never makes the logits; it is not meant for torch.compile
    trained = model if liger else torch.compile(model)

    def step() -> int:
        with me.waits_for_data():
            inputs, targets, weights, real = next(rows)
        labels = targets.masked_fill(weights == 0, -100)
        with autocast:
            if liger:
                loss = trained(input_ids=inputs, shift_labels=labels).loss
            else:
                logits = trained(input_ids=inputs, use_cache=False).logits
                loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return real

    me = Contender(step, not liger)
    return me


MAKERS: dict[str, Callable[[Setting], Contender]] = {
    "ours": lambda s: ours(s, True),
    "ours-eager": lambda s: ours(s, False),
    "eager": lambda s: plain(s, False),
    "compile": lambda s: plain(s, True),
    "upstream-style": upstream_style,
    "hf": hf,
    "hf-bf16": lambda s: hf(s, pure=True),
    "liger": lambda s: hf(s, liger=True),
}


def why_not(name: str, preset: str, device: torch.device) -> str | None:
    """None if this contender can run here, else one short reason."""
    if name.startswith(("hf", "liger")):
        if importlib.util.find_spec("transformers") is None:
            return "transformers is not installed"
        if ModelConfig.preset(preset).num_experts or ModelConfig.preset(preset).qk_norm:
            return f"LlamaForCausalLM is no model of {preset}'s shape"
    if name == "liger" and device.type != "cuda":
        return "Liger-Kernel needs a GPU"
    if name == "liger" and importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    return None


def _model(s: Setting) -> Model:
    torch.manual_seed(0)
    model = Model(ModelConfig.preset(s.preset)).to(s.device)
    model.compute_dtype = choose_precision(s.device).compute_dtype
    return model


def _llama(s: Setting, liger: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    c = ModelConfig.preset(s.preset)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=c.hidden_size, num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads, head_dim=c.head_dim, intermediate_size=c.intermediate_size,
        vocab_size=c.vocab_size, tie_word_embeddings=True, max_position_embeddings=c.max_position_embeddings,
        rms_norm_eps=c.rms_norm_eps,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _padded_rows(s: Setting) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """(inputs, targets, weights, real tokens) without end: each document a row of its own, cut or padded."""
    order = np.random.default_rng(0).permutation(s.corpus.num_documents)
    place = 0
    while True:
        ids = torch.zeros(s.rows, s.seq_len + 1, dtype=torch.int64)
        mask = torch.zeros(s.rows, s.seq_len + 1)
        for row in range(s.rows):
            document = s.corpus.document(int(order[place % len(order)]))[: s.seq_len + 1]
            place += 1
            ids[row, : len(document)] = torch.from_numpy(document.astype(np.int64))
            mask[row, : len(document)] = 1
        real = int(mask[:, 1:].sum())
        parts = (ids[:, :-1], ids[:, 1:], mask[:, 1:])
        inputs, targets, weights = (t.contiguous().to(s.device) for t in parts)
        yield cast("tuple[Tensor, Tensor, Tensor, int]", (inputs, targets, weights, real))
