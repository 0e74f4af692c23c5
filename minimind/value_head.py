"""A model that also says how good things stand: a decoder with a linear head of one number per position.

Reward models score an answer at its last token, critics (PPO) the state at every token, either on a trunk of their own
or, as a ValueModel is a Model, on the policy's. On disk it is what transformers calls a sequence classifier with one
label: `score.weight` beside the decoder's own tensors, under the names of HF Llama and Qwen3. One that is an adapter
on a frozen model lies in an adapter's folder, with the head beside it in value_head.safetensors.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minimind.config import ModelConfig
from minimind.lora import merge_adapter, remove_adapters
from minimind.lora_files import CONFIG, base_of, load_adapter
from minimind.modeling import Linear, Model, ModelOutput
from minimind.ops.attention import SharedPrefix
from minimind.weights import checkpoint_folder, from_stock, load_model, to_stock

SCORE, HEAD = "score.weight", "value_head.safetensors"


@dataclass
class ValueOutput(ModelOutput):
    """values float32 [B, T]: of the state after each input token."""

    values: Tensor


class ValueModel(Model):
    """A Model with `value_head`, [1, C] and without a bias. It begins at zero: all values are 0, and the first update
    moves the head alone."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.value_head = Linear(config.hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)

    @staticmethod
    def of(model: Model, keep_head: bool = False) -> ValueModel:
        """A copy of `model` on its device, in its dtypes, with a new value head.

        keep_head: with the output projection of a model that does not tie it, for a policy that shares its trunk with
        its critic. A critic alone has no use for it, and parameters without a gradient stop DDP.
        """
        tied = model.config.tie_word_embeddings or not keep_head
        weight = model.embed_tokens.weight
        with torch.device("meta"):
            value_model = ValueModel(replace(model.config, tie_word_embeddings=tied))
        state = {k: v.clone() for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
        state["value_head.weight"] = weight.new_zeros(1, model.config.hidden_size)
        value_model.load_state_dict(state, assign=True)
        value_model.compute_dtype, value_model.recompute = model.compute_dtype, model.recompute
        return value_model.train(model.training)

    def forward(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        shared_prefix: SharedPrefix | None = None,
        return_logits: bool = False,
    ) -> ValueOutput:
        """As of Model, with the values; logits only on request."""
        out = super().forward(
            input_ids,
            position_ids=position_ids,
            cu_seqlens=cu_seqlens,
            attention_mask=attention_mask,
            shared_prefix=shared_prefix,
            return_logits=return_logits,
        )
        hidden = out.hidden_states
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))  # bfloat16 has steps of 1 / 128 near 1
        values = F.linear(wide, self.value_head.weight.to(wide.dtype)).squeeze(-1)
        return ValueOutput(**vars(out), values=values)


def save_value_model(model: Model, folder: Path) -> None:
    """Write config.json and model.safetensors into `folder`: load_value_model opens it, and transformers where it knows
    the decoder (dense models: LlamaForSequenceClassification, with norms of q and k Qwen3ForSequenceClassification)."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_classifier_config(model.config), indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    state = dict(model.state_dict())
    head = state.pop("value_head.weight")
    stock = {k: v.contiguous() for k, v in to_stock(state, model.config).items()}
    save_file(stock | {SCORE: head.contiguous()}, folder / "model.safetensors", metadata={"format": "pt"})
    # safetensors lets its owner alone read it
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def load_value_model(path: str | Path, config: ModelConfig | None = None) -> ValueModel:
    """What save_value_model wrote, or the newest checkpoint of a run of train/reward.py, an adapter merged into its
    base: float32, on the CPU, in eval mode. Raises ValueError, naming the folder, where there is no value head or a
    tensor does not fit."""
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        folder = checkpoint_folder(folder)
    if (folder / CONFIG).is_file():
        return _merged(folder)
    if not has_value_head(folder):
        raise ValueError(f"{folder}: no value head ({SCORE}) in it; name a run of train/reward.py")
    config = config or _read_config(folder / "config.json")
    state = load_file(folder / "model.safetensors")
    head = state.pop(SCORE)
    if head.shape != (1, config.hidden_size):
        raise ValueError(f"{folder}: {SCORE} is {list(head.shape)}, the config wants [1, {config.hidden_size}]")
    with torch.device("meta"):
        model = ValueModel(config)
    packed = from_stock(state, config, source=str(folder)) | {"value_head.weight": head}
    model.load_state_dict({k: v.float() for k, v in packed.items()}, assign=True)
    return model.eval()


def _merged(folder: Path) -> ValueModel:
    if not has_value_head(folder):
        raise ValueError(f"{folder}: no value head ({HEAD}) in it; name a run of train/reward.py")
    model = load_model(base_of(folder))
    load_adapter(model, folder)
    merge_adapter(model)
    remove_adapters(model)
    value_model = ValueModel.of(model)
    with torch.no_grad():
        value_model.value_head.weight.copy_(read_head(folder))
    return value_model.eval()


def save_head(model: Model, folder: Path) -> None:
    """The head alone, beside an adapter."""
    assert isinstance(model, ValueModel)
    save_file({SCORE: model.value_head.weight.detach().cpu()}, folder / HEAD, metadata={"format": "pt"})
    shutil.copymode(folder / CONFIG, folder / HEAD)


def read_head(folder: Path) -> Tensor:
    """What save_head wrote: [1, C]."""
    return load_file(folder / HEAD)[SCORE]


def has_value_head(folder: Path) -> bool:
    """Whether `folder` holds weights of ours with a value head: in one file, as save_value_model writes, or beside an
    adapter."""
    if (folder / HEAD).is_file():
        return True
    path = folder / "model.safetensors"
    if not path.is_file():
        return False
    with safe_open(path, "pt") as file:
        return SCORE in list(file.keys())


def _read_config(path: Path) -> ModelConfig:
    """Our own keys alone: what transformers calls the decoder says less."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    return ModelConfig.from_dict({k: v for k, v in raw.items() if k != "model_type"})


def _classifier_config(config: ModelConfig) -> dict[str, object]:
    """Our own keys, and for dense models those that transformers looks at besides."""
    raw = config.to_dict()
    if config.num_experts or config.rope_scaling is not None:
        return raw | {"num_labels": 1}
    kind = "qwen3" if config.qk_norm else "llama"
    architecture = "Qwen3ForSequenceClassification" if config.qk_norm else "LlamaForSequenceClassification"
    return raw | {"architectures": [architecture], "model_type": kind, "num_labels": 1, "hidden_act": "silu"}
