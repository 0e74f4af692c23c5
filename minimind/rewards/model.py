"""Reward models: from train/reward.py, any sequence classifier of transformers, or models like InternLM2-Reward.

Each scores the prompt and answer as its own chat template renders them. Scores have no fixed range: weight them, and
compare them within a group or normalise them over the batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minimind.rewards.rules import Reward, Sample
from minimind.tokenization import ChatEncoder, load_tokenizer
from minimind.utils.device import choose_precision
from minimind.utils.files import read_json
from minimind.value_head import HEAD, ValueModel, load_value_model
from minimind.weights import checkpoint_folder

BATCH_TOKENS = 16384  # per forward, padding included; a longer conversation runs alone


def model_reward(folder: str, device: torch.device, trust_remote_code: bool = False) -> Reward:
    """Load the reward model in `folder` onto `device`, in bfloat16 if that is faster there.

    trust_remote_code: allow a model to run its own Python code. ValueError if `folder` holds no reward model, or one
    whose code is not allowed to run."""
    path = reward_weights(folder)
    if (path / HEAD).is_file():  # an adapter: its base model has the config
        return ValueReward.open(path, device)
    config = read_json(path / "config.json")
    if config is None:
        raise ValueError(
            f"model={folder}: it has no config.json; name a run of train/reward.py or a Hugging Face folder"
        )
    if "router_aux_loss_level" in config:  # only our own configs have this key
        return ValueReward.open(path, device)
    return _transformers_reward(path, config, device, trust_remote_code)


def reward_weights(folder: str) -> Path:
    """The folder that holds the weights: `folder`, or the best or newest checkpoint of a run. ValueError if missing."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ValueError(f"model={folder}: no such folder; name a run of train/reward.py or a Hugging Face folder")
    return checkpoint_folder(path) if any(path.glob("checkpoints/step-*")) else path


@dataclass
class ValueReward:
    """A ValueModel as a reward: its value at the answer's last token, before the token that ends the turn."""

    model: ValueModel
    encoder: ChatEncoder
    batch_tokens: int = BATCH_TOKENS

    @staticmethod
    def open(folder: Path, device: torch.device) -> ValueReward:
        tokenizer = load_tokenizer(folder)
        model = load_value_model(folder).to(device)
        model.config.with_tokenizer(tokenizer.vocab_size, f"model={folder}")  # ValueError if it has too many ids
        model.compute_dtype = choose_precision(device, "auto").compute_dtype
        return ValueReward(model, ChatEncoder(tokenizer))

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> np.ndarray:
        pieces = [self.encoder.pieces(conversation(sample)) for sample in samples]
        rows = [row.ids[: np.flatnonzero(row.trained)[-1]] for row in self.encoder.encode(pieces)]
        scores = np.empty(len(rows))
        for part in batches([len(row) for row in rows], self.batch_tokens, padded=False):
            bounds = np.cumsum([0, *(len(rows[i]) for i in part)])
            ids, ends = np.concatenate([rows[i] for i in part]).astype(np.int64), bounds[1:] - 1
            input_ids, cu_seqlens, last = (
                torch.from_numpy(array).to(self.model.device) for array in (ids[None], bounds.astype(np.int32), ends)
            )
            values = self.model(input_ids, cu_seqlens=cu_seqlens).values.flatten()
            scores[part] = values[last].double().cpu().numpy()
        return scores


@dataclass
class ClassifierReward:
    """A sequence classifier of transformers with one label as a reward: its logit."""

    model: Any
    tokenizer: Any
    batch_tokens: int = BATCH_TOKENS

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> np.ndarray:
        rows = [
            self.tokenizer.apply_chat_template(conversation(sample), tokenize=True, return_dict=False)
            for sample in samples
        ]
        scores = np.empty(len(rows))
        for part in batches([len(row) for row in rows], self.batch_tokens, padded=True):
            scores[part] = self._logits([rows[i] for i in part])
        return scores

    def _logits(self, rows: list[list[int]]) -> np.ndarray:
        """transformers takes the token before the first pad token as a row's last. Many models pad with the token that
        ends a turn, which would cut rows short, so we pad with a token that no row contains."""
        used = set(itertools.chain(*rows))
        pad = next(token for token in itertools.count() if token not in used)
        self.model.config.pad_token_id = pad
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows])
        mask = torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]
        device = self.model.device
        logits = self.model(input_ids=ids.to(device), attention_mask=mask.long().to(device)).logits
        return logits[:, 0].double().cpu().numpy()


@dataclass
class ScoresReward:
    """A model with its own get_scores(tokenizer, conversations), such as InternLM2-Reward, as a reward."""

    model: Any
    tokenizer: Any
    batch_size: int = 16

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> np.ndarray:
        chats = [conversation(sample) for sample in samples]
        parts = [chats[i : i + self.batch_size] for i in range(0, len(chats), self.batch_size)]
        return np.array([score for part in parts for score in self.model.get_scores(self.tokenizer, part)], float)


def conversation(sample: Sample) -> list[dict[str, Any]]:
    """The prompt's messages, followed by the answer as the assistant's message."""
    return [*(dict(message) for message in sample.prompt), {"role": "assistant", "content": sample.text}]


def batches(lengths: Sequence[int], batch_tokens: int, padded: bool) -> Iterator[np.ndarray]:
    """Group conversations of similar length: indices of those that share a forward of at most batch_tokens tokens,
    padding included if `padded`."""
    part: list[int] = []
    total = 0
    for i in np.argsort(lengths, kind="stable"):
        grown = (len(part) + 1) * lengths[i] if padded else total + lengths[i]
        if part and grown > batch_tokens:
            yield np.array(part)
            part, total = [], 0
        part.append(int(i))
        total += lengths[i]
    if part:
        yield np.array(part)


def _transformers_reward(
    path: Path, config: Mapping[str, Any], device: torch.device, trust_remote_code: bool
) -> Reward:
    remote_code = config.get("auto_map") or {}
    if remote_code and not trust_remote_code:
        raise ValueError(
            f"model={path}: it brings its own Python code; read it, then allow it with --trust-remote-code"
        )
    try:
        from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
    except ImportError:
        raise ValueError(
            f"model={path}: needs transformers; pip install 'minimind[export]', or train your own with train/reward.py"
        ) from None
    options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    dtype = torch.float32
    if device.type == "cuda":  # on CPUs transformers' bfloat16 is no faster
        dtype = choose_precision(device, "auto").compute_dtype or dtype
    scores_itself = "AutoModel" in remote_code and "AutoModelForSequenceClassification" not in remote_code
    kind = AutoModel if scores_itself else AutoModelForSequenceClassification
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        model = kind.from_pretrained(path, dtype=dtype, **options).to(device).eval()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"model={path}: transformers cannot open it ({str(error).splitlines()[0]})") from error
    if scores_itself:
        if not hasattr(model, "get_scores"):
            raise ValueError(f"model={path}: {type(model).__name__} has no get_scores(tokenizer, conversations)")
        return ScoresReward(model, tokenizer)
    if model.config.num_labels != 1:
        raise ValueError(f"model={path}: a classifier with {model.config.num_labels} labels; a reward model has one")
    if not tokenizer.chat_template:
        raise ValueError(f"model={path}: its tokenizer has no chat template, which a reward model needs")
    return ClassifierReward(model, tokenizer)
