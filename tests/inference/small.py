"""Random models small enough for a test, a tokenizer of a few hundred tokens, and generation by full forwards."""

from __future__ import annotations

import functools

import torch

from minimind import ModelConfig, load_tokenizer
from minimind.config import YarnScaling
from minimind.modeling import Model
from minimind.tokenization import Tokenizer
from minimind.tokenization.training import train_bpe

TEXT = "你好，世界！Hello world, hello there. 😀👍🏽 naïve café\n"
VARIANTS = {
    "dense": {},
    "qk_norm, untied": {"qk_norm": True, "tie_word_embeddings": False},
    "moe": {"num_experts": 4, "moe_intermediate_size": 32, "num_shared_experts": 1},
    "moe top-1, qk_norm": {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "qk_norm": True},
    "yarn": {
        "max_position_embeddings": 64,
        "rope_scaling": YarnScaling(factor=4.0, original_max_position_embeddings=64),
    },
}


@functools.cache
def small_tokenizer() -> Tokenizer:
    return load_tokenizer().with_model(train_bpe([TEXT] * 4, 300))


def small_model(variant: str = "dense", vocab_size: int | None = None, seed: int = 0, **overrides) -> Model:
    """Weights so large that the likeliest token is seldom close to the second."""
    vocab_size = vocab_size or small_tokenizer().vocab_size
    torch.manual_seed(seed)
    shape = {"max_position_embeddings": 512, **VARIANTS[variant], **overrides}
    model = Model(ModelConfig(32, 2, 4, 2, 16, 48, vocab_size, **shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model


def random_prompts(count: int, longest: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def greedy(model: Model, prompt: list[int], new_tokens: int) -> list[int]:
    """The true greedy tokens: the argmax of a whole forward for each."""
    ids = list(prompt)
    for _ in range(new_tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@torch.no_grad()
def is_greedy(model: Model, prompt: list[int], new: list[int]) -> bool:
    """Whether every new token is the argmax of a whole forward; checks `greedy` with one forward."""
    logits = model(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1]
    return logits.argmax(-1).tolist() == new
