"""A decoder with a value head: a linear layer that gives one number per position, for reward models and critics.

A reward model scores an answer at its last token; PPO's critic scores the state at every token, with a trunk of its own
or the policy's (a ValueModel is a Model). On disk it is a sequence classifier of transformers with one label:
`score.weight` next to the decoder's tensors, under the names of HF Llama and Qwen3. If it is an adapter on a frozen
model, the adapter's folder holds the head in value_head.safetensors.
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
from minimind.lora_files import CONFIG, find_base, load_adapter
from minimind.modeling import Linear, Model, ModelOutput
from minimind.ops.attention import SharedPrefix
from minimind.weights import checkpoint_folder, from_stock, load_model, to_stock

SCORE, HEAD = "score.weight", "value_head.safetensors"


@dataclass
class ValueOutput(ModelOutput):
    """values: float32 [B, T], the value of the state after each input token."""

    values: Tensor


class ValueModel(Model):
    """A Model with a bias-free `value_head`, weight [1, C]. It starts at zero, so all values are 0 and the first update
    changes the head only."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.value_head = Linear(config.hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)

    @staticmethod
    def from_model(model: Model, keep_head: bool = False) -> ValueModel:
        """Copy `model`, on its device and in its dtypes, and add a new value head.

        keep_head: also copy an untied output projection, for a policy that shares its trunk with the critic. A critic
        alone does not use it, and DDP fails on parameters without a gradient.
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
        """Model.forward with values, and without logits by default."""
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
    """Write config.json and model.safetensors into `folder`, for load_value_model. transformers can open dense models
    too: as LlamaForSequenceClassification, or Qwen3ForSequenceClassification with QK-norm."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_classifier_config(model.config), indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    state = dict(model.state_dict())
    head = state.pop("value_head.weight")
    stock = {k: v.contiguous() for k, v in to_stock(state, model.config).items()}
    save_file(stock | {SCORE: head.contiguous()}, folder / "model.safetensors", metadata={"format": "pt"})
    # safetensors makes files readable by the owner only
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def load_value_model(path: str | Path, config: ModelConfig | None = None) -> ValueModel:
    """Load a folder of save_value_model, or a run of train/reward.py, with an adapter merged into its base: float32, on
    the CPU, in eval mode. ValueError, naming the folder, if it has no value head or a tensor does not fit."""
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        folder = checkpoint_folder(folder)
    if (folder / CONFIG).is_file():
        return _merged(folder)
    if not has_value_head(folder):
        raise ValueError(f"{folder}: it has no value head ({SCORE}); name a run of train/reward.py")
    config = config or _read_config(folder / "config.json")
    state = load_file(folder / "model.safetensors")
    head = state.pop(SCORE)
    if head.shape != (1, config.hidden_size):
        raise ValueError(f"{folder}: {SCORE} is {list(head.shape)}, the config needs [1, {config.hidden_size}]")
    with torch.device("meta"):
        model = ValueModel(config)
    packed = from_stock(state, config, source=str(folder)) | {"value_head.weight": head}
    model.load_state_dict({k: v.float() for k, v in packed.items()}, assign=True)
    return model.eval()


def _merged(folder: Path) -> ValueModel:
    """Load an adapter with a value head and merge it into its base."""
    if not has_value_head(folder):
        raise ValueError(f"{folder}: it has no value head ({HEAD}); name a run of train/reward.py")
    model = load_model(find_base(folder))
    load_adapter(model, folder)
    merge_adapter(model)
    remove_adapters(model)
    value_model = ValueModel.from_model(model)
    with torch.no_grad():
        value_model.value_head.weight.copy_(read_head(folder))
    return value_model.eval()


def save_head(model: Model, folder: Path) -> None:
    """Write the value head into an adapter's folder."""
    assert isinstance(model, ValueModel)
    save_file({SCORE: model.value_head.weight.detach().cpu()}, folder / HEAD, metadata={"format": "pt"})
    shutil.copymode(folder / CONFIG, folder / HEAD)


def read_head(folder: Path) -> Tensor:
    """Read the value head that save_head wrote: [1, C]."""
    return load_file(folder / HEAD)[SCORE]


def has_value_head(folder: Path) -> bool:
    """Whether `folder` holds our weights with a value head, from save_value_model or save_head."""
    if (folder / HEAD).is_file():
        return True
    path = folder / "model.safetensors"
    if not path.is_file():
        return False
    with safe_open(path, "pt") as file:
        return SCORE in list(file.keys())


def _read_config(path: Path) -> ModelConfig:
    """Read our own keys only: transformers' model_type would be read as a less specific dialect."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    return ModelConfig.from_dict({k: v for k, v in raw.items() if k != "model_type"})


def _classifier_config(config: ModelConfig) -> dict[str, object]:
    """The config with our own keys and, for dense models, the keys that transformers needs."""
    raw = config.to_dict()
    if config.num_experts or config.rope_scaling is not None:
        return raw | {"num_labels": 1}
    kind = "qwen3" if config.qk_norm else "llama"
    architecture = "Qwen3ForSequenceClassification" if config.qk_norm else "LlamaForSequenceClassification"
    return raw | {"architectures": [architecture], "model_type": kind, "num_labels": 1, "hidden_act": "silu"}
