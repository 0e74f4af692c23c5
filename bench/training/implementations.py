"""The training steps that bench/throughput.py compares, each as its own project would run it at its best.

ours            train/STAGE.py --compile --fused: packed rows, the device's precision, no logits, fused AdamW; for dpo,
                the reference's log-probabilities are computed before the first step, as train/dpo.py does once for a
                data set (`once` is the time that this takes for a step's batch)
ours-muon       the same with Muon for the matrices, the default of train/pretrain.py
ours-eager      ours without --compile
eager           this project's plain PyTorch model on the same packed rows, in the same precision, with full logits
compile         the same under torch.compile
upstream-style  the plain model as upstream MiniMind trains it (bench/training/stages.py): one sequence a row, padded to
                --seq-len, full logits, mean over unmasked tokens, plain AdamW; bf16 autocast on a GPU, float32 on a CPU
upstream-bf16   the same under bf16 autocast on a CPU, which upstream does not do
hf              transformers' LlamaForCausalLM on such rows: float32 weights under bf16 autocast, SDPA, torch.compile,
                fused AdamW
hf-bf16         the same with weights, gradients and AdamW in bf16: faster, but not the same training
liger           hf with Liger-Kernel's RMSNorm, RoPE, SwiGLU and fused cross-entropy (GPU only)
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bench.common.models import transformers_model
from bench.training.stages import ALPHA, BETA, STAGES, StageBenchmark, frozen_model, padded_batches, upstream_loss
from minimind import ops
from minimind.config import ModelConfig
from minimind.data.corpus import Corpus
from minimind.data.pair_loader import PairBatch
from minimind.modeling import Model
from minimind.objectives.next_token import Distillation, distillation_loss, next_token_loss
from minimind.objectives.preference import dpo, pair_log_probs, preference_loss
from minimind.ops import varlen
from minimind.ops.attention import attention_name
from minimind.training.batches import DeviceBatches
from minimind.training.job import compile_model
from minimind.training.optim import OptimizerName, build_optimizers
from minimind.training.stages.dpo import to_device as pairs_to_device
from minimind.utils.device import choose_precision

CAUSAL_STAGES = ("pretrain", "sft", "reason")  # a causal model of another library can train these
PLAIN_STAGES = ("pretrain", "sft", "reason", "lora")  # those without a second model


@dataclass(frozen=True)
class ThroughputSetting:
    """rows x seq_len: size of upstream's batch; ours has as many positions. steps: number of steps of a run."""

    stage: str
    preset: str
    corpus: Corpus
    rows: int
    seq_len: int
    optimizer: OptimizerName
    device: torch.device
    steps: int

    @property
    def positions(self) -> int:
        return self.rows * self.seq_len

    @property
    def kind(self) -> StageBenchmark:
        return STAGES[self.stage]


@dataclass
class Implementation:
    """step() trains once and returns the number of positions of its batch that are not padding. compiled: whether it
    uses torch.compile. loading: seconds spent so far on waiting for data. once: seconds for a step's batch of work that
    is done once for the data set. attention: the name of its implementation."""

    step: Callable[[], int]
    compiled: bool = False
    loading: float = 0.0
    once: float | None = None
    attention: str = "sdpa"

    @contextlib.contextmanager
    def waits_for_data(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.loading += time.perf_counter() - start


StepLoss = Callable[[Model, Any], Any]  # (loss, auxiliary loss, ...)


def ours(s: ThroughputSetting, compiled: bool) -> Implementation:
    ops.set_mode("fused")
    model, kind = s.kind.prepare(_model(s)), s.kind
    attention = _attention(s, model)
    trained = compile_model(model) if compiled else model
    optimizer = build_optimizers(model, s.optimizer, 1e-4, 0.1)
    loss_of: StepLoss = next_token_loss
    to_device, once = None, None
    if kind.pairs:
        loss_of, to_device, once = _preferences(s, model)
    elif kind.teacher is not None:
        loss_of = _distillation(s, compiled)
    batches = DeviceBatches(kind.loader(s.corpus, s.rows, s.seq_len), s.device, to_device)

    def step() -> int:
        with implementation.waits_for_data():
            batch = batches.next_batch()
        real = _real(batches)
        loss, aux, *_ = loss_of(trained, batch)
        (loss / batch.global_weight + aux).backward()
        batches.fetch()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return real

    implementation = Implementation(step, compiled, once=once, attention=attention)
    return implementation


def _attention(s: ThroughputSetting, model: Model) -> str:
    """Choose the attention as a run does; its name."""
    c, dtype = model.config, choose_precision(s.device).compute_dtype
    varlen.choose("auto", s.device, varlen.Heads(c.num_attention_heads, c.num_key_value_heads, c.head_dim, dtype))
    return attention_name(s.device, dtype, fused=True)


def _distillation(s: ThroughputSetting, compiled: bool) -> StepLoss:
    teacher = frozen_model(s.kind, s.preset, s.device, choose_precision(s.device).compute_dtype)
    assert teacher is not None
    compiled_teacher = compile_model(teacher) if compiled else teacher
    return lambda model, batch: distillation_loss(model, compiled_teacher, batch, Distillation(alpha=ALPHA))


@torch.no_grad()
def _preferences(s: ThroughputSetting, model: Model) -> tuple[StepLoss, Any, float]:
    """(loss, function that moves a batch to the device, seconds of the reference for a batch). The reference is `model`
    as it is now."""
    loader = s.kind.loader(s.corpus, s.rows, s.seq_len)
    scores = np.zeros((s.corpus.num_documents, 2))
    model.eval()
    start = time.perf_counter()
    for _ in range(s.steps):
        host: Any = loader.next_batch()
        batch = pairs_to_device(host, s.device)
        pairs, _ = pair_log_probs(model, batch)
        scores[host.pairs] = torch.stack((pairs.chosen, pairs.rejected), 1).cpu().numpy()
    once = (time.perf_counter() - start) / s.steps
    model.train()
    objective = partial(dpo, beta=BETA)
    return (
        lambda model, batch: preference_loss(model, batch, objective),
        partial(pairs_to_device, reference=scores),
        once,
    )


def plain(s: ThroughputSetting, compiled: bool) -> Implementation:
    ops.set_mode("reference")
    model = s.kind.prepare(_model(s))
    trained = compile_model(model) if compiled else model
    optimizer = torch.optim.AdamW(_trained(model), lr=1e-4, betas=(0.9, 0.95), fused=True)
    batches = DeviceBatches(s.kind.loader(s.corpus, s.rows, s.seq_len), s.device)

    def step() -> int:
        with implementation.waits_for_data():
            batch = batches.next_batch()
        real = _real(batches)
        out = trained(batch.input_ids, cu_seqlens=batch.cu_seqlens, attention_mask=batch.targets.ne(-100))
        logits = out.logits.flatten(0, 1).float()
        loss = F.cross_entropy(logits, batch.targets.flatten(), reduction="none")
        if batch.loss_weights is not None:
            loss = loss * batch.loss_weights.flatten()
        (loss.sum() / batch.global_weight + out.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return real

    implementation = Implementation(step, compiled, attention="masked")
    return implementation


def upstream_style(s: ThroughputSetting, autocast: bool) -> Implementation:
    ops.set_mode("reference")
    torch.manual_seed(0)
    model = s.kind.prepare(Model(ModelConfig.preset(s.preset)).to(s.device))
    frozen = frozen_model(s.kind, s.preset, s.device, None)
    optimizer = torch.optim.AdamW(_trained(model), lr=1e-4)
    batches = padded_batches(s.kind, s.corpus, s.rows, s.seq_len, s.device)

    def step() -> int:
        with implementation.waits_for_data():
            batch = next(batches)
        with torch.autocast(s.device.type, torch.bfloat16, enabled=autocast):
            loss = upstream_loss(s.kind, model, frozen, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return batch.real

    implementation = Implementation(step)
    return implementation


def hf(s: ThroughputSetting, pure: bool = False, liger: bool = False) -> Implementation:
    model = _llama(s, liger).to(s.device, torch.bfloat16 if pure else torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batches = padded_batches(s.kind, s.corpus, s.rows, s.seq_len, s.device)
    autocast = torch.autocast(s.device.type, torch.bfloat16, enabled=not pure)
    # Liger's loss takes the labels and never computes logits; it is not meant for torch.compile
    trained = model if liger else torch.compile(model)

    def step() -> int:
        with implementation.waits_for_data():
            batch = next(batches)
        labels = batch.targets.masked_fill(batch.weights == 0, -100)
        with autocast:
            if liger:
                loss = trained(input_ids=batch.inputs, shift_labels=labels).loss
            else:
                logits = trained(input_ids=batch.inputs, use_cache=False).logits
                loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return batch.real

    implementation = Implementation(step, not liger)
    return implementation


IMPLEMENTATIONS: dict[str, Callable[[ThroughputSetting], Implementation]] = {
    "ours": lambda s: ours(s, True),
    "ours-muon": lambda s: ours(dataclasses.replace(s, optimizer="muon"), True),
    "ours-eager": lambda s: ours(s, False),
    "eager": lambda s: plain(s, False),
    "compile": lambda s: plain(s, True),
    "upstream-style": lambda s: upstream_style(s, s.device.type == "cuda"),
    "upstream-bf16": lambda s: upstream_style(s, True),
    "hf": hf,
    "hf-bf16": lambda s: hf(s, pure=True),
    "liger": lambda s: hf(s, liger=True),
}


def optimizer_of(name: str, s: ThroughputSetting) -> OptimizerName:
    """The optimizer of this implementation."""
    if name == "ours-muon":
        return "muon"
    return s.optimizer if name.startswith("ours") else "adamw"


def why_not(name: str, stage: str, preset: str, device: torch.device) -> str | None:
    """None if this implementation can run here, else one short reason."""
    if name == "ours-muon" and stage == "lora":
        return "adapters are trained with adamw"
    if name in ("eager", "compile") and stage not in PLAIN_STAGES:
        return f"no plain form of {stage} exists for packed rows"
    if name == "upstream-bf16" and device.type == "cuda":
        return "on a GPU, upstream-style computes in bf16 already"
    if name.startswith(("hf", "liger")):
        if stage not in CAUSAL_STAGES:
            return f"LlamaForCausalLM alone cannot train {stage}"
        if importlib.util.find_spec("transformers") is None:
            return "transformers is not installed"
        if ModelConfig.preset(preset).num_experts or ModelConfig.preset(preset).qk_norm:
            return f"LlamaForCausalLM cannot have the shape of {preset}"
    if name == "liger" and device.type != "cuda":
        return "Liger-Kernel needs a GPU"
    if name == "liger" and importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    return None


def _model(s: ThroughputSetting) -> Model:
    torch.manual_seed(0)
    model = Model(ModelConfig.preset(s.preset)).to(s.device)
    model.compute_dtype = choose_precision(s.device).compute_dtype
    return model


def _real(batches: DeviceBatches) -> int:
    """Positions of the newest batch that are not padding, which is token 0 and occurs in no document. A prompt that
    both sides of a pair share counts twice, as upstream computes it twice."""
    host = batches.host
    assert host is not None
    shared = host.shared if isinstance(host, PairBatch) else 0
    return int(np.count_nonzero(host.input_ids)) + shared


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _llama(s: ThroughputSetting, liger: bool) -> Any:
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    torch.manual_seed(0)
    return transformers_model(ModelConfig.preset(s.preset))
