"""The stages that bench/throughput.py measures: their data, their batches and their losses.

Each stage has two forms. Ours is that of train/STAGE.py: packed rows, no logits. Upstream's form follows MiniMind's
scripts: each sequence has a row of its own, cut or padded to max_seq_len, all logits are computed, and the loss is

    pretrain, sft, lora, reason   cross-entropy of every position, then masked
    distill                       the same, plus KL(teacher || student) of the unmasked positions
    dpo                           log_softmax over the vocabulary for the policy and, in every step, the reference; a
                                  pair takes two rows (ours packs pairs into rows twice as long, with the prompt that
                                  both sides share once)

seq_len is upstream's max_seq_len for the stage in its scripts of 2025 for minimind2-small (older ones have 512 for
SFT); for pretraining, both sides take 512 instead of upstream's 340.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from minimind.config import ModelConfig
from minimind.data import builtin_conversations, builtin_corpus, open_conversations
from minimind.data.builtin.chat import builtin_identity, builtin_preferences
from minimind.data.builtin.problems import builtin_reasoning
from minimind.data.cache import open_corpus, open_preferences
from minimind.data.corpus import Corpus
from minimind.data.encoding import SIDE, class_of
from minimind.data.loader import PackedLoader
from minimind.data.pair_loader import PairLoader
from minimind.lora import LoRAConfig, add_adapter
from minimind.modeling import Model
from minimind.tokenization import ChatEncoder, load_tokenizer
from minimind.tokenization.reasoning import ReasoningEncoder

TEACHER = "minimind2"  # of distill, as in upstream's script
LORA = LoRAConfig(rank=8, targets=("q_proj", "o_proj"))  # upstream adapts the square matrices
MARKER_WEIGHT = 10.0  # of reason
BETA, ALPHA = 0.1, 0.5  # of dpo; the data's share in distill


@dataclass(frozen=True)
class StageBenchmark:
    """seq_len: length of upstream's rows. open(paths, console): the corpus; without paths, of the built-in data.
    marker_weight: weight of reasoning markers in the loss. adapter: the trained part, None for the whole model. pairs:
    whether documents are preference pairs."""

    seq_len: int
    open: Callable[[Sequence[str], Console], Corpus]
    marker_weight: float = 1.0
    adapter: LoRAConfig | None = None
    pairs: bool = False
    teacher: str | None = None

    def loader(self, corpus: Corpus, rows: int, seq_len: int, seed: int = 0) -> PackedLoader:
        """Packed batches with as many positions as `rows` x `seq_len`."""
        if self.pairs:
            return PairLoader(corpus, 2 * seq_len, rows // 2, seed=seed, share=True)
        return PackedLoader(corpus, seq_len, rows, seed=seed, marker_weight=self.marker_weight)

    def prepare(self, model: Model) -> Model:
        if self.adapter is not None:
            add_adapter(model, self.adapter)
        return model


def _texts(paths: Sequence[str], console: Console) -> Corpus:
    return open_corpus(paths or [str(builtin_corpus(console=console))], load_tokenizer(), console=console)


def _chats(builtin: Callable[..., Any], paths: Sequence[str], console: Console) -> Corpus:
    data = list(paths) or [str(builtin(console=console)[0])]
    return open_conversations(data, ChatEncoder(load_tokenizer()), console=console)


def _reasoning(paths: Sequence[str], console: Console) -> Corpus:
    data = list(paths) or [str(builtin_reasoning(console=console)[0])]
    return open_conversations(data, ReasoningEncoder(load_tokenizer(), 0.3), console=console)


def _preferences(paths: Sequence[str], console: Console) -> Corpus:
    data = list(paths) or [str(builtin_preferences(console=console)[0])]
    return open_preferences(data, ChatEncoder(load_tokenizer()), console=console)


STAGES: dict[str, StageBenchmark] = {
    "pretrain": StageBenchmark(512, _texts),
    "sft": StageBenchmark(340, partial(_chats, builtin_conversations)),
    "lora": StageBenchmark(340, partial(_chats, builtin_identity), adapter=LORA),
    "distill": StageBenchmark(340, partial(_chats, builtin_conversations), teacher=TEACHER),
    "reason": StageBenchmark(720, _reasoning, marker_weight=MARKER_WEIGHT),
    "dpo": StageBenchmark(1024, _preferences, pairs=True),
}


@dataclass(frozen=True)
class PaddedBatch:
    """inputs, targets int64 [B, T]; weights float32 [B, T], 0 at positions that upstream masks; real: the number of
    positions that are not padding. For pairs, the first half of the rows are the chosen answers."""

    inputs: Tensor
    targets: Tensor
    weights: Tensor
    real: int


def padded_batches(
    stage: StageBenchmark, corpus: Corpus, rows: int, seq_len: int, device: torch.device, seed: int = 0
) -> Iterator[PaddedBatch]:
    """Upstream's batches, endlessly."""
    source = _sequences(stage, corpus, seed)
    while True:
        ids = np.zeros((rows, seq_len + 1), np.int64)
        weights = np.zeros((rows, seq_len + 1), np.float32)
        real = 0
        order = [*range(0, rows, 2), *range(1, rows, 2)] if stage.pairs else range(rows)
        for place in np.argsort(order):  # a pair's sides come one after the other
            tokens, weight = next(source)
            length = min(len(tokens), seq_len + 1)
            ids[place, :length], weights[place, :length] = tokens[:length], weight[:length]
            real += length - 1
        parts = (ids[:, :-1], ids[:, 1:], weights[:, 1:])
        inputs, targets, kept = (torch.from_numpy(a.copy()).to(device) for a in parts)
        yield PaddedBatch(inputs, targets, kept, real)


def _sequences(stage: StageBenchmark, corpus: Corpus, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield, endlessly and in random order, the tokens of a document and their loss weights; for pairs, those of each
    side."""
    order = np.random.default_rng(seed).permutation(corpus.num_documents)
    while True:
        for i in order.tolist():
            tokens = corpus.document(i)
            if not corpus.weighted:
                yield tokens, np.ones(len(tokens), np.float32)
                continue
            codes = corpus.codes(i)
            weights = np.array([0, 1, stage.marker_weight], np.float32)[class_of(codes)]
            cut = int(np.flatnonzero(codes & SIDE)[0]) if stage.pairs else len(tokens)
            yield tokens[:cut], weights[:cut]
            if stage.pairs:
                yield tokens[cut:], weights[cut:]


@dataclass(frozen=True)
class Padding:
    """The share of padding over a whole pass, in upstream's rows and in packed rows."""

    padded: float
    packed: float


def padding_of(stage: StageBenchmark, corpus: Corpus, rows: int, seq_len: int) -> Padding:
    """Counted over all documents; the packed share is that of the loader's first window."""
    lengths = corpus.lengths(np.arange(corpus.num_documents))
    if stage.pairs:
        sides = [int(np.flatnonzero(corpus.codes(i) & SIDE)[0]) for i in range(corpus.num_documents)]
        lengths = np.concatenate([sides, lengths - np.array(sides)])
    filled = np.minimum(lengths - 1, seq_len).sum() / (len(lengths) * seq_len)
    return Padding(1 - float(filled), 1 - stage.loader(corpus, rows, seq_len).fill)


Logits = Callable[[Tensor], Any]  # input ids -> an object with logits [B, T, V] and aux_loss


def upstream_loss(stage: StageBenchmark, model: Logits, frozen: Logits | None, batch: PaddedBatch) -> Tensor:
    """The loss in upstream's script of this stage. frozen: the teacher or the reference model."""
    if stage.pairs:
        return _dpo(model, frozen, batch)
    out = model(batch.inputs)
    logits, weights = out.logits.flatten(0, 1).float(), batch.weights.flatten()
    loss = F.cross_entropy(logits, batch.targets.flatten(), reduction="none")
    loss = (loss * weights).sum() / weights.sum() + out.aux_loss
    if frozen is None:
        return loss
    with torch.no_grad():
        teacher = frozen(batch.inputs).logits.flatten(0, 1)[weights > 0].float().softmax(-1)
    student = logits[weights > 0].log_softmax(-1)
    return ALPHA * loss + (1 - ALPHA) * F.kl_div(student, teacher, reduction="batchmean")


def _dpo(model: Logits, frozen: Logits | None, batch: PaddedBatch) -> Tensor:
    assert frozen is not None

    def score(out: Any) -> tuple[Tensor, ...]:
        log_probs = F.log_softmax(out.logits.float(), dim=-1)
        log_probs = log_probs.gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1)
        return (log_probs * batch.weights).sum(1).chunk(2)

    with torch.no_grad():
        reference = score(frozen(batch.inputs))
    out = model(batch.inputs)
    policy = score(out)
    margin = (policy[0] - policy[1]) - (reference[0] - reference[1])
    return -F.logsigmoid(BETA * margin).mean() + out.aux_loss


def frozen_model(stage: StageBenchmark, preset: str, device: torch.device, dtype: torch.dtype | None) -> Model | None:
    """The teacher, or the reference, a copy of the new model; None if the stage has neither. dtype: of its
    computations, None for that of its weights."""
    if not stage.pairs and stage.teacher is None:
        return None
    torch.manual_seed(0)
    model = Model(ModelConfig.preset(stage.teacher or preset)).to(device)
    model.compute_dtype = dtype
    return model.requires_grad_(False).eval()
