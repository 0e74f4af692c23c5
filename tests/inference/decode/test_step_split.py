"""A step whose products are large enough to be divided between the threads while they run."""

from __future__ import annotations

import pytest
import torch

from bench.common.timing import busy_programs
from minimind.config import ModelConfig
from tests.inference.decode.cases import needs_native
from tests.inference.decode.test_int8 import int8_decoder
from tests.inference.decode.test_step import Decoder, assert_rows_are_the_same, make_model, token_ids

# 32 or more blocks in each product, two in a piece: more than two pieces for each of three threads
LARGE = {
    "hidden_size": 512, "num_hidden_layers": 1, "intermediate_size": 1024, "vocab_size": 2000,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
}  # fmt: skip
CONFIGS = {
    "dense": ModelConfig(**LARGE),
    "moe": ModelConfig(
        **LARGE, num_experts=4, num_experts_per_tok=2, num_shared_experts=1, moe_intermediate_size=320
    ),
}  # fmt: skip


@needs_native
@pytest.mark.heavy
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_is_the_same_bit_for_bit_beside_a_program_that_slows_a_thread(name, weights):
    model = make_model(CONFIGS[name])

    def make(rows: int) -> Decoder:
        return int8_decoder(model, rows) if weights == "int8" else Decoder.of(model, rows, getattr(torch, weights))

    with busy_programs(1):
        assert_rows_are_the_same(make, token_ids(model.config, 19, 5))
