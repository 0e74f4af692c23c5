"""What a training step keeps in a GPU's memory: arithmetic over the model's shape, so that a batch is chosen to fit.

Counted are the tensors that the Triton path keeps for the backward in 16-bit compute, the float32 master weights with
gradient and AdamW state, a 16-bit copy of the weights, the head's gradient and chunk of logits, and the scratch of
attention's backward. The allocator's fragments and CUDA's own half gigabyte are left to `share`.
tests/kernels/test_memory.py compares the first with what autograd saves; `torch.compile` may keep less, as it computes
some of it again.
"""

from __future__ import annotations

from minimind.config import ModelConfig

CONTEXT_BYTES = 1 << 29  # CUDA's context and libraries, about
MOST_TOKENS = 1 << 16  # of a forward and backward, whatever fits
GPU_BATCH = 1 << 16  # of a step there, where nobody says
_POSITION = 12  # of a token: its row of the rotation's table
_HEAD_CHUNK = 2048  # tokens whose logits exist at once
_PER_BOUNDARY = 64  # tokens; the built-in corpus has 93, with the quarter that a loader adds


def activation_bytes(config: ModelConfig, recompute: bool = False) -> int:
    """Bytes that one token keeps from the forward to the backward, the loss left out."""
    if recompute:  # the blocks' inputs, and one block at a time that is run again
        return config.num_hidden_layers * 4 * config.hidden_size + _layer_bytes(config)
    return config.num_hidden_layers * _layer_bytes(config) + 4 * config.hidden_size  # the first input, the last sum


def _layer_bytes(config: ModelConfig) -> int:
    hidden, dim = config.hidden_size, config.head_dim
    q, kv = config.num_attention_heads * dim, config.num_key_value_heads * dim
    halves = 4 * hidden + 2 * q + 2 * kv  # both norms' inputs and outputs; q, k, v and the attention's result
    floats = 2 + config.num_attention_heads  # 1 / rms of each norm; the log-sum-exp of each head
    if config.qk_norm:
        halves += q + 2 * kv  # as projected
        floats += config.num_attention_heads + config.num_key_value_heads
    if not config.num_experts:
        return 2 * (halves + 3 * config.intermediate_size) + 4 * floats
    halves += config.num_shared_experts * 3 * config.intermediate_size
    halves += config.num_experts_per_tok * 2 * config.moe_intermediate_size
    floats += hidden + 3 * config.num_experts + 4 * config.num_experts_per_tok + 1  # the router's input and its scores
    return 2 * halves + 4 * floats


def attention_scratch_bytes(config: ModelConfig, tokens: int, boundaries: int) -> int:
    """Bytes that FlashAttention-2's backward takes for a layer and gives back: float32 sums of dq, heads rounded up to
    32 numbers, and of the softmax's gradient, both with 128 rows more for each document; keys' and values' gradients
    for each query head, 16 bit, where these share them (mha_varlen_bwd in its csrc/flash_attn/flash_api.cpp)."""
    heads, dim = config.num_attention_heads, config.head_dim
    sums = 4 * (tokens + 128 * boundaries) * heads * (-(-dim // 32) * 32 + 1)
    return sums + (4 * tokens * heads * dim if config.num_key_value_heads < heads else 0)


def state_bytes(config: ModelConfig, parameters: int) -> int:
    """Bytes that do not depend on the batch: 16 a parameter, a 16-bit copy, and the head's gradient and logits."""
    head = config.vocab_size * (4 * config.hidden_size + 6 * _HEAD_CHUNK)
    return 18 * parameters + head


def step_bytes(
    config: ModelConfig, parameters: int, trained: int, tokens: int, recompute: bool = False, trunks: int = 1
) -> int:
    """Bytes of a forward and backward of `tokens` on one card: what `tokens_that_fit` counts, and CUDA's own. trained:
    how many of the `parameters` are; a frozen one has neither gradient nor moments. trunks: models of this shape that
    such a step goes through."""
    frozen = parameters - trained
    activations = tokens * (activation_bytes(config, recompute) + 4 * config.hidden_size)
    scratch = attention_scratch_bytes(config, tokens, -(-tokens // _PER_BOUNDARY))
    return CONTEXT_BYTES + state_bytes(config, parameters) - 12 * frozen + trunks * activations + scratch


def tokens_that_fit(
    config: ModelConfig, parameters: int, memory: int, recompute: bool = False, share: float = 0.9
) -> int:
    """How many tokens a forward and backward may hold at once on a card with `memory` bytes; 0 when not even the
    model fits. Beside the activations each token has its hidden state's gradient and a copy of it, 16 bit, and its part
    of the scratch of attention's backward."""
    left = share * (memory - CONTEXT_BYTES) - state_bytes(config, parameters)
    scratch = attention_scratch_bytes(config, _PER_BOUNDARY, 1) / _PER_BOUNDARY
    return max(0, int(left / (activation_bytes(config, recompute) + 4 * config.hidden_size + scratch)))


def halved(batch_tokens: int, limit: int, row: int, ranks: int) -> int:
    """Tokens of a micro-batch: of a step, halved down to `limit` while every rank has a row and rows stay whole."""
    while batch_tokens > limit and batch_tokens % (2 * row) == 0 and batch_tokens // 2 >= ranks * row:
        batch_tokens //= 2
    return batch_tokens
