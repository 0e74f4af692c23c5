"""Does the suite notice a defect? Each mutation below is one small edit that breaks something, and the tests named
beside it must fail because of it:

    python tests/mutations.py --list
    python tests/mutations.py --check-clean          the named tests as they are first, then every mutation
    python tests/mutations.py --only packing         those whose file, defect or tests contain the word
    python tests/mutations.py --slow --only arm      also those that only slow tests notice, a minute or two each

Everything happens in a temporary copy of the files that git does not ignore. When a test moves, change the name here;
a file is as good as a single test while it takes seconds. The exit status is 1 unless every mutation was caught.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("minimind/_native_cpu.so", "minimind/_native_cuda.so", "minimind/_native_build.json")
# An edit that makes Python stumble over itself proves nothing about the tests.
STUMBLES = ("NameError", "UnboundLocalError", "SyntaxError", "IndentationError", "ImportError", "ModuleNotFoundError")
LIMIT = 900.0  # seconds for the named tests, far above what any takes: a mutation may never end


@dataclass(frozen=True)
class Mutation:
    """defect: what is wrong after `old`, which stands in `file` once, has become `new`. tests: files or node ids,
    with spaces between. slow: they are slow tests, and need the flag --slow."""

    defect: str
    file: str
    old: str
    new: str
    tests: str
    slow: bool = False

    def __str__(self) -> str:
        return f"{self.file}: {self.defect}"


_ARM = "tests/csrc/test_kernel_parity.py::test_kernels_of_arm_in_an_emulator"
_AGENTS = "tests/training/test_agent.py::test_rewards_teach_it_to_call"
MUTATIONS = (
    # kernels/
    Mutation(
        "the mean of squares is over the padded row",
        "kernels/rms_norm.py",
        "b_rstd = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / D +",
        "b_rstd = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / BLOCK_D +",
        "tests/kernels/test_rms_norm.py",
    ),
    Mutation(
        "one term of dx is off by a thousandth",
        "kernels/rms_norm.py",
        "(b_dxhat - b_xhat * b_mean[:, None])",
        "(b_dxhat - b_xhat * b_mean[:, None] * 1.001)",
        "tests/kernels/test_rms_norm.py",
    ),
    Mutation(
        "the residual stream's own gradient is lost",
        "kernels/rms_norm.py",
        "_rms_norm_backward(dy, total, weight, rstd, dtotal)",
        "_rms_norm_backward(dy, total, weight, rstd, None)",
        "tests/kernels/test_rms_norm.py",
    ),
    Mutation(
        "the gradient is turned forward instead of back",
        "kernels/rope_sections.py",
        "_rotate(b_first, b_second, b_cos, -b_sin)",
        "_rotate(b_first, b_second, b_cos, b_sin)",
        "tests/kernels/test_rope.py",
    ),
    Mutation(
        "half of a head's weight gradient is off by a thousandth",
        "kernels/rope_sections.py",
        "b_dw_second += b_second * b_x_second",
        "b_dw_second += b_second * b_x_second * 1.001",
        "tests/kernels/test_rope.py",
    ),
    Mutation(
        "the last row of the tables is never taken",
        "kernels/rope_sections.py",
        "tl.minimum(tl.maximum(b_position, 0), n_positions - 1)",
        "tl.minimum(tl.maximum(b_position, 0), n_positions - 2)",
        "tests/kernels/test_rope.py",
    ),
    Mutation(
        "the gate's derivative is off by a thousandth of one term",
        "kernels/swiglu.py",
        "(1.0 + b_gate * (1.0 - b_sigmoid))",
        "(1.0 + b_gate * (1.001 - b_sigmoid))",
        "tests/kernels/test_swiglu.py",
    ),
    Mutation(
        "p is rounded to the logits' dtype before 1 is taken off it",
        "kernels/linear_cross_entropy.py",
        "b_at_target = b_scale * expm1(b_log_p)",
        "b_at_target = b_scale * (tl.exp(b_log_p).to(p_row.dtype.element_ty).to(tl.float32) - 1.0)",
        "tests/kernels/test_linear_cross_entropy.py::test_linear_cross_entropy",
    ),
    Mutation(
        "the PyTorch form loses the weight in the target's gradient",
        "kernels/linear_cross_entropy.py",
        "scale * log_p.expm1()",
        "log_p.expm1()",
        "tests/kernels/test_linear_cross_entropy.py::test_linear_cross_entropy",
    ),
    Mutation(
        "a row of several tiles does not rescale the sum of the tiles before",
        "kernels/chunked_linear.py",
        "b_sum = tl.exp(b_shift) * b_sum + tl.sum(b_e, axis=0)",
        "b_sum = b_sum + tl.sum(b_e, axis=0)",
        "tests/kernels/test_linear_cross_entropy.py::test_rows_longer_than_a_tile",
    ),
    Mutation(
        "the head's gradient is added up over chunks in the dtype of x",
        "kernels/chunked_linear.py",
        "dw = torch.zeros(w.shape if need_dw else (0,), dtype=torch.float32, device=x.device)",
        "dw = torch.zeros(w.shape if need_dw else (0,), dtype=x.dtype, device=x.device)",
        "tests/kernels/test_linear_cross_entropy.py::test_float16_where_the_sum_over_chunks_leaves_its_range",
    ),
    Mutation(
        "the loss's gradient is rounded to bfloat16 before it scales",
        "kernels/chunked_linear.py",
        "torch.mul(gradient, scale.reshape(1), out=out)",
        "torch.mul(gradient, scale.to(gradient.dtype).reshape(1), out=out)",
        "tests/kernels/test_linear_cross_entropy.py::test_factors_on_a_bfloat16_gradient",
    ),
    Mutation(
        "the temperature does not divide the gradient",
        "kernels/linear_log_probs.py",
        "b_dz * b_inverse_t, mask",
        "b_dz, mask",
        "tests/kernels/test_linear_log_probs.py::test_linear_log_probs",
    ),
    Mutation(
        "the entropy's gradient lacks the entropy itself",
        "kernels/linear_log_probs.py",
        "b_dz -= b_dentropy * b_p * (b_log_p + b_entropy)",
        "b_dz -= b_dentropy * b_p * b_log_p",
        "tests/kernels/test_linear_log_probs.py::test_linear_log_probs",
    ),
    Mutation(
        "the PyTorch form measures from the stored maximum without the temperature",
        "kernels/linear_log_probs.py",
        "log_p = logits.float().sub_(stats[0]).div_(temperature).sub_(stats[1])",
        "log_p = logits.float().sub_(stats[0]).sub_(stats[1])",
        "tests/kernels/test_linear_log_probs.py::test_linear_log_probs",
    ),
    Mutation(
        "the mixture's two shares change places in one term",
        "kernels/linear_distillation.py",
        "_log_over_mixture(-b_d, rest, beta)",
        "_log_over_mixture(-b_d, beta, rest)",
        "tests/kernels/test_linear_distillation.py::test_linear_distillation",
    ),
    Mutation(
        "the temperature does not divide the gradient",
        "kernels/linear_distillation.py",
        "b_factor = b_scale * b_inverse_t",
        "b_factor = b_scale",
        "tests/kernels/test_linear_distillation.py::test_linear_distillation",
    ),
    Mutation(
        "gates that sum to 1 get the gradient of gates that do not",
        "kernels/moe_routing.py",
        "tl.where(b_chosen, (b_dscores - b_mean) / b_sum, 0.0)",
        "tl.where(b_chosen, b_dscores / b_sum, 0.0)",
        "tests/kernels/test_moe_routing.py",
    ),
    Mutation(
        "the tokens that should not count are those that do",
        "kernels/moe_routing.py",
        "tl.load(p_mask + o_token, mask=m_token, other=0) != 0)",
        "tl.load(p_mask + o_token, mask=m_token, other=0) == 0)",
        "tests/kernels/test_moe_routing.py",
    ),
    Mutation(
        "a token that is alone in its tile is left out of the weights' gradient",
        "kernels/grouped_gemm.py",
        "for i_row in range(row, end, BLOCK_K):",
        "for i_row in range(row, end - 1, BLOCK_K):",
        "tests/kernels/test_moe_experts.py::test_moe_experts",
    ),
    Mutation(
        "the up projection's gradient is off by a thousandth",
        "kernels/grouped_gemm.py",
        "tl.store(p_dgate_up + INTER, b_du * b_silu, mask=mask)",
        "tl.store(p_dgate_up + INTER, b_du * b_silu * 1.001, mask=mask)",
        "tests/kernels/test_moe_experts.py::test_moe_experts",
    ),
    Mutation(
        "a gate's gradient is multiplied by the gate",
        "kernels/grouped_gemm.py",
        "return tl.sum(b_dh * b_h, axis=1)",
        "return tl.sum(b_dh * b_h * b_scale, axis=1)",
        "tests/kernels/test_moe_experts.py::test_moe_experts",
    ),
    # csrc/cuda, under the emulator
    Mutation(
        "warps are put together as if all had the same maximum",
        "csrc/cuda/attention_merge.cuh",
        "const float weight = exp2f(r.maximum[row] - maximum);",
        "const float weight = maximum > r.maximum[row] + 99 ? 0.0f : 1.0f;",
        "tests/csrc/test_cuda_emulated.py::test_attention_of_every_preset",
    ),
    Mutation(
        "a sequence sees one key beyond its end",
        "csrc/cuda/attention_tensor_core.cuh",
        "scores[i] = token + 8 * (i / 2) < end ?",
        "scores[i] = token + 8 * (i / 2) <= end ?",
        "tests/csrc/test_cuda_emulated.py::test_attention_of_every_preset",
    ),
    Mutation(
        "probabilities are rounded to 16 bits",
        "csrc/cuda/attention_tensor_core.cuh",
        "low[half] = movmatrix_trans(pack<T>(first - unpack<T>(pair, 0), second - unpack<T>(pair, 1)));",
        "low[half] = movmatrix_trans(pack<T>(0.0f, 0.0f));",
        "tests/csrc/test_cuda_emulated.py::test_probabilities_are_not_rounded_to_16_bits",
    ),
    Mutation(
        "every head divides by the first one's float8 scale",
        "csrc/cuda/rope.cuh",
        "if (scale != nullptr) divisor = scale[group];",
        "if (scale != nullptr) divisor = scale[0];",
        "tests/csrc/test_cuda_emulated.py::test_rope_append_kv",
    ),
    Mutation(
        "top-p is a share of all tokens, not of those that top-k left",
        "csrc/cuda/sample.cuh",
        "AtLeastMass{top_p * bounds.at_low.mass}",
        "AtLeastMass{top_p * all.mass}",
        "tests/csrc/test_cuda_emulated.py::test_sample",
    ),
    Mutation(
        "the first block to finish puts the splits together, not the last",
        "csrc/cuda/attention_merge.cuh",
        "last = atomicInc(arrivals, others) == others;",
        "last = atomicInc(arrivals, others) == 0;",
        "tests/csrc/test_cuda_emulated.py::test_attention_over_many_splits",
    ),
    Mutation(
        "of the 33rd sequence on, splits are counted from the first",
        "csrc/cuda/attention_split.cuh",
        "first_ += kWarp, before_ = all;",
        "first_ += kWarp;",
        "tests/csrc/test_cuda_emulated.py::test_splits_are_put_together_in_one_order_whoever_comes_last",
    ),
    Mutation(
        "the new token's key is fetched before it is written",
        "csrc/cuda/attention_tensor_core.cuh",
        "const int early = makes_last ? min(tiles - 1, kStages)",
        "const int early = makes_last ? kStages",
        "tests/csrc/test_decode_step_emulated.py::test_the_order_of_threads_and_blocks_does_not_matter",
    ),
    Mutation(
        "weights beyond those under way at once are those just used",
        "csrc/cuda/matvec.cuh",
        "rows.load(slot, chunk + slot + kDepth<kRows>, lane, p.k);",
        "rows.load(slot, chunk + slot, lane, p.k);",
        "tests/csrc/test_decode_step_emulated.py::test_rows_longer_than_what_is_under_way_at_once",
    ),
    Mutation(
        "the up projection goes through SiLU, not the gate",
        "csrc/cuda/matvec.cuh",
        "y = y / (1.0f + expf(-y)) * up;",
        "y = up / (1.0f + expf(-up)) * y;",
        "tests/csrc/test_decode_step_emulated.py::test_a_step_in_float32_is_the_models",
    ),
    Mutation(
        "rows of the up projection take the scales of the gate",
        "csrc/cuda/matvec.cuh",
        "scale = p.scales[row_of_weight<kRows>(p, first, i)];",
        "scale = p.scales[min(first + i, p.n - 1)];",
        "tests/csrc/test_int8_step_emulated.py::test_a_step_is_that_of_the_rounded_weights",
    ),
    Mutation(
        "on a GPU the layers compute with weights that are not rounded",
        "minimind/inference/runner.py",
        "self._weights.round_matrices()",
        "pass",
        "tests/csrc/test_int8_engine_emulated.py::test_few_and_many_sequences_are_of_the_same_model",
    ),
    # csrc/cpu
    Mutation(
        "a group's sum of 8-bit products forgets that its weights were moved by 128",
        "csrc/cpu/int8.h",
        "to.offset = -128 * static_cast<int32_t>(sum);",
        "to.offset = 0;",
        "tests/csrc/test_int8_forms.py",
    ),
    Mutation(
        "top-k leaves one token more",
        "csrc/cpu/sample.cpp",
        "least = order[static_cast<size_t>(row.top_k) - 1];",
        "least = *std::max_element(order.begin() + row.top_k, order.end());",
        "tests/inference/decode/test_sampling.py",
    ),
    Mutation(
        "a query sees the key behind its own",
        "csrc/cpu/document_attention.h",
        "inverse[i] = 1.0f / exponentials_of(b.scores + i * keys, start + i + 1, keys, scale);",
        "inverse[i] = 1.0f / exponentials_of(b.scores + i * keys, start + i + 2, keys, scale);",
        "tests/ops/test_attention.py::test_documents",
    ),
    Mutation(
        "the scores' gradient lacks the scale",
        "csrc/cpu/document_attention.h",
        "(load(dp + j) - mean) * scale * load(p + j)",
        "(load(dp + j) - mean) * load(p + j)",
        "tests/ops/test_attention.py::test_documents",
    ),
    Mutation(
        "chunks of a long sequence are put together as if all had the same maximum",
        "csrc/cpu/attention.h",
        "const float factor = exponential(broadcast(part[0] - maximum))[0];",
        "const float factor = part[0] > maximum ? 0.0f : 1.0f;",
        "tests/inference/decode/test_ops.py::test_long_sequences",
    ),
    Mutation(
        "gates that should sum to 1 do not",
        "csrc/cpu/feed_forward.h",
        "gates[k] /= sum_chosen + 1e-20f;",
        "gates[k] /= total;",
        "tests/inference/decode/test_step.py::test_decoding_step_by_step_equals_the_models_forward",
    ),
    # the same on ARM, in an emulator
    Mutation(
        "products of bfloat16 pairs on ARM are squares of the first factor",
        "csrc/cpu/vec.h",
        "vbfdotq_f32(reinterpret_cast<float32x4_t>(sum), a, b)",
        "vbfdotq_f32(reinterpret_cast<float32x4_t>(sum), a, (static_cast<void>(b), a))",
        _ARM,
        slow=True,
    ),
    Mutation(
        "on ARM with i8mm one half of a tile adds to the other half's sum",
        "csrc/cpu/int8.h",
        "vmmlaq_s32(tiles[v][1][p], high, pairs[p])",
        "vmmlaq_s32(tiles[v][0][p], high, pairs[p])",
        _ARM,
        slow=True,
    ),
    Mutation(
        "8-bit dot products on ARM start anew at every word",
        "csrc/cpu/int8.h",
        "return vdotq_s32(sum, w, x);",
        "return vdotq_s32(vandq_s32(sum, vdupq_n_s32(0)), w, x);",
        _ARM,
        slow=True,
    ),
    # the model
    Mutation(
        "the reference mask lets documents see those before them in the row",
        "minimind/ops/attention.py",
        "((document[:, :, None] == document[:, None, :]) & causal)",
        "((document[:, :, None] >= document[:, None, :]) & causal)",
        "tests/test_modeling.py::test_packed_padded_and_single_documents_agree",
    ),
    Mutation(
        "a document's first token belongs to the one before",
        "minimind/ops/attention.py",
        "position, right=True)",
        "position, right=False)",
        "tests/objectives/test_preference.py",
    ),
    Mutation(
        "padding can be seen",
        "minimind/ops/attention.py",
        "visible = causal & attention_mask.bool()[:, None, :]",
        "visible = causal.expand(batch, length, length)",
        "tests/test_modeling.py::test_packed_padded_and_single_documents_agree",
    ),
    Mutation(
        "a query sees the key behind its own",
        "minimind/ops/document_attention.py",
        "dtype=dtype).triu_(1)",
        "dtype=dtype).triu_(2)",
        "tests/ops/test_attention.py::test_documents",
    ),
    Mutation(
        "the keys' gradient lacks the scale",
        "minimind/ops/document_attention.py",
        "_flat(q[part], rows), alpha=scale)",
        "_flat(q[part], rows))",
        "tests/ops/test_attention.py::test_documents",
    ),
    Mutation(
        "an expert's gradient counts the rows of those beside it",
        "minimind/ops/expert_linear.py",
        "if part.window != part.rows:",
        "if part.window.start != part.rows.start:",
        "tests/ops/test_ops.py::test_expert_linear",
    ),
    Mutation(
        "the balance of the experts is not divided by the choices of a token",
        "minimind/modeling.py",
        "tokens = counts.sum().clamp(min=1) / config.num_experts_per_tok",
        "tokens = counts.sum().clamp(min=1)",
        "tests/test_modeling.py::test_tokens_per_expert_and_balanced_loss tests/test_golden.py",
    ),
    Mutation(
        "YaRN's ramp begins one pair too early",
        "minimind/rope.py",
        "ramp = ((index - low) / max(high - low, 0.001))",
        "ramp = ((index - low + 1) / max(high - low, 0.001))",
        "tests/test_golden.py::test_logits",
    ),
    Mutation(
        "values of a bfloat16 trunk are bfloat16",
        "minimind/value_head.py",
        "values = F.linear(wide, self.value_head.weight.to(wide.dtype)).squeeze(-1)",
        "values = F.linear(hidden, self.value_head.weight.to(hidden.dtype)).squeeze(-1)",
        "tests/test_value_head.py",
    ),
    # low-rank adapters
    Mutation(
        "A's gradient is scaled by alpha / rank twice",
        "minimind/lora.py",
        "low = F.linear(x, self.A.to(x.dtype)) * self.config.scale",
        "low = F.linear(x, torch.lerp(self.A.detach(), self.A, self.config.scale).to(x.dtype)) * self.config.scale",
        "tests/test_lora.py::test_logits_and_gradients_are_those_of_the_dense_weights",
    ),
    Mutation(
        "merging forgets alpha / rank",
        "minimind/lora.py",
        "a.to(total.dtype) * adapter.config.scale",
        "a.to(total.dtype)",
        "tests/test_lora.py::test_merged_weights_compute_the_same_and_the_frozen_ones_come_back",
    ),
    Mutation(
        "rsLoRA's scale is plain LoRA's",
        "minimind/lora.py",
        "return self.alpha / (self.rank**0.5 if self.rslora else self.rank)",
        "return self.alpha / self.rank",
        "tests/test_lora_files.py::test_equal_to_peft_both_ways",
    ),
    # data
    Mutation(
        "the end of a long document is dropped",
        "minimind/data/packing.py",
        "counts = -(-pairs // seq_len)",
        "counts = np.maximum(pairs // seq_len, pairs > 0)",
        "tests/data/test_packing.py",
    ),
    Mutation(
        "a token is its own target",
        "minimind/data/loader.py",
        "targets[filled] = self.view.gather(own.address + 1, own.length)",
        "targets[filled] = self.view.gather(own.address, own.length)",
        "tests/data/test_loader.py",
    ),
    Mutation(
        "the loss is divided by the targets of this rank alone",
        "minimind/data/loader.py",
        "_TargetCounts(int(own.length.sum()), int(batch.length.sum()),",
        "_TargetCounts(int(own.length.sum()), int(own.length.sum()),",
        "tests/data/test_loader.py",
    ),
    Mutation(
        "a resumed run reads its window from the beginning",
        "minimind/data/packing.py",
        "self.epoch, self.window, self.row = epoch, window, row",
        "self.epoch, self.window, self.row = epoch, window, 0",
        "tests/data/test_loader.py",
    ),
    Mutation(
        "every pass has the order of the first",
        "minimind/data/packing.py",
        "Permutation(count, self.seed, epoch)",
        "Permutation(count, self.seed, 0)",
        "tests/data/test_loader.py",
    ),
    Mutation(
        "the loss mask is that of the inputs, not of the targets",
        "minimind/data/loader.py",
        "classes = class_of(self.view.gather_codes(own.address + 1, own.length))",
        "classes = class_of(self.view.gather_codes(own.address, own.length))",
        "tests/data/test_conversations.py",
    ),
    Mutation(
        "heavier tokens do not count in the sum of weights",
        "minimind/data/loader.py",
        "weight = number + markers * (self.marker_weight - 1)",
        "weight = number",
        "tests/data/test_conversations.py",
    ),
    Mutation(
        "a conversation is cut before the token that ends its turn",
        "minimind/data/loader.py",
        "kept = int(turns[-1]) + 1 if len(turns) else seq_len",
        "kept = int(turns[-1]) if len(turns) else seq_len",
        "tests/data/test_conversations.py",
    ),
    Mutation(
        "another tokenizer finds the tokens of this one",
        "minimind/data/cache.py",
        "parts = [FORMAT_VERSION, kind, content_hash, *recipe.key()]",
        "parts = [FORMAT_VERSION, kind, content_hash]",
        "tests/data/test_cache.py",
    ),
    Mutation(
        "files of the wrong size are taken for whole",
        "minimind/data/cache.py",
        "any(os.path.getsize(folder / n) != size for n, size in",
        "any(os.path.getsize(folder / n) < 0 for n, size in",
        "tests/data/test_cache.py",
    ),
    Mutation(
        "bad rows that are in the cache are no error",
        "minimind/data/cache.py",
        'if bad.count and on_bad_row == "error":',
        'if bad.count > 1000 and on_bad_row == "error":',
        "tests/data/test_cache.py",
    ),
    Mutation(
        "tokens of a part of a file are read from its beginning",
        "minimind/data/corpus.py",
        "first = starts + piece.source.index[piece.first, 0]",
        "first = starts",
        "tests/data/test_corpus.py",
    ),
    Mutation(
        "a copy of a training document is held out",
        "minimind/data/split.py",
        "groups, of_group = np.unique(key, return_inverse=True)",
        "groups, of_group = number, np.arange(len(number))",
        "tests/data/test_split.py",
    ),
    Mutation(
        "copies are looked for in the first part of the hashes alone",
        "minimind/data/split.py",
        "for part in range(parts):",
        "for part in range(1):",
        "tests/data/test_split.py",
    ),
    Mutation(
        "a part of a mixture that is drawn once more is not owed less",
        "minimind/data/mixture.py",
        "self.owed[part] -= 1",
        "self.owed[part] -= 0.5",
        "tests/data/test_mixture.py",
    ),
    Mutation(
        "a resumed mixture forgets what its parts are owed",
        "minimind/data/loader.py",
        'self._draw.taken, self._draw.owed = state["taken"], list(state["owed"])',
        'self._draw.taken = state["taken"]',
        "tests/data/test_mixture.py",
    ),
    Mutation(
        "a prompt is cut within a character",
        "minimind/tokenization/chat_encoder.py",
        "begins[content[count]] < ends[content[count] - 1]",
        "count < 0",
        "tests/data/test_preferences.py",
    ),
    Mutation(
        "the header of a question goes with its beginning",
        "minimind/tokenization/chat_encoder.py",
        "content = np.flatnonzero((begins >= first) & (ends <= last))",
        "content = np.flatnonzero((begins >= begin) & (ends <= last))",
        "tests/data/test_preferences.py",
    ),
    Mutation(
        "a reward model reads the rejected answer without its prompt",
        "minimind/objectives/preference.py",
        "        shared_prefix=batch.shared_prefix,\n    )\n    values",
        "    )\n    values",
        "tests/training/test_pairs.py",
    ),
    Mutation(
        "an answer that was cut is learnt without its end",
        "minimind/data/loader.py",
        "if len(turns) or not whole_answers else 0",
        "if len(turns) or whole_answers else 0",
        "tests/data/test_conversations.py",
    ),
    Mutation(
        "a run of an earlier version goes on with today's split",
        "minimind/training/identity.py",
        "                chosen[name] = value\n            elif",
        "                chosen[name] = None\n            elif",
        "tests/training/test_run_folder.py",
    ),
    Mutation(
        "passes of an unfinished run of when they were a flag alone are chosen anew",
        "minimind/training/identity.py",
        " and name not in _LATER",
        "",
        "tests/training/test_run_folder.py",
    ),
    Mutation(
        "a plan begins to read in the middle of a row",
        "minimind/training/plan.py",
        "        if begin:\n            file.readline()\n",
        "",
        "tests/training/test_plan_sample.py",
    ),
    Mutation(
        "a plan counts the tokens it has read for all there are",
        "minimind/training/job.py",
        "epochs * args.scale * loader",
        "epochs * loader",
        "tests/training/test_plan.py::test_a_declared_size_stretches_the_rows_at_hand",
    ),
    Mutation(
        "an adapter is trained with what its model was",
        "minimind/training/data_split.py",
        "    if job.flags.optimizer is None:\n        adapter =",
        "    if True:\n        adapter =",
        "tests/training/test_plan.py::test_a_shape_without_weights_and_files_of_every_kind",
    ),
    Mutation(
        "an error names the line after the bad row",
        "minimind/data/reader.py",
        "report(line, reason_of(error))\n            continue\n        yield Document",
        "report(line + 1, reason_of(error))\n            continue\n        yield Document",
        "tests/data/test_reader.py",
    ),
    Mutation(
        "a torn Zstandard file ends quietly",
        "minimind/data/reader.py",
        "if self._frame is not None:\n                        raise",
        "if self._frame is False:\n                        raise",
        "tests/data/test_reader.py",
    ),
    Mutation(
        "the last token of the chosen side is not told from the rejected side's first",
        "minimind/data/pair_loader.py",
        "np.stack([middle - 1, tail], 1).ravel(),",
        "np.stack([middle, tail - 1], 1).ravel(),",
        "tests/data/test_preferences.py",
    ),
    Mutation(
        "a message of weight 0 is learnt",
        "minimind/data/fields.py",
        "        kept[TRAIN] = False",
        "        kept[TRAIN] = True",
        "tests/data/test_fields.py",
    ),
    Mutation(
        "a field that is not known is dropped",
        "minimind/data/fields.py",
        "name not in used and name.lower() not in HARMLESS and not is_empty(value)",
        "name not in used and name.lower() in ()",
        "tests/data/test_fields.py",
    ),
    Mutation(
        "what was tokenized in one form is taken for another",
        "minimind/data/formats.py",
        'return ["fields", VERSION, self.name, sorted(set(self.ignored))] if',
        'return ["fields", VERSION] if',
        "tests/data/test_fields.py",
    ),
    Mutation(
        "links to folders are not followed",
        "minimind/data/paths.py",
        "        below = os.path.isdir(path)\n",
        "        below = entry.is_dir(follow_symlinks=False)\n",
        "tests/data/test_paths.py",
    ),
    Mutation(
        "a file that has two names is read twice",
        "minimind/data/paths.py",
        "self.files.setdefault(path.resolve(), path)",
        "self.files.setdefault(path.absolute(), path)",
        "tests/data/test_paths.py",
    ),
    Mutation(
        "a text is cut wherever it may be",
        "minimind/tokenization/tokenizer.py",
        "        if np.concatenate(sides).tolist() == ids:\n",
        "        if sides:\n",
        "tests/tokenization/test_long_texts.py",
    ),
    Mutation(
        "a row of any size is read whole",
        "minimind/data/reader.py",
        "line = stream.readline(MOST_BYTES)",
        "line = stream.readline()",
        "tests/data/test_huge_rows.py",
    ),
    # tokenization
    Mutation(
        "the token that ends a turn is not learnt",
        "minimind/tokenization/chat_encoder.py",
        "return start, end + len(self._eos)",
        "return start, end",
        "tests/tokenization/test_chat_encoder.py",
    ),
    Mutation(
        "the assistant's header is learnt",
        "minimind/tokenization/chat_encoder.py",
        "start = len(before) + len(self._header)",
        "start = len(before)",
        "tests/tokenization/test_chat_encoder.py",
    ),
    Mutation(
        "a user can write control tokens",
        "minimind/tokenization/chat_encoder.py",
        'mode: Any = True if control else "markup"',
        "mode: Any = True",
        "tests/tokenization/test_chat_encoder.py",
    ),
    Mutation(
        "reasoning that the data lacks is learnt as an empty block",
        "minimind/tokenization/reasoning.py",
        "out.append(replace(piece, text=self._block, trained=False))",
        "out.append(replace(piece, text=self._block))",
        "tests/tokenization/test_reasoning.py",
    ),
    Mutation(
        "Chinese in tools is escaped",
        "minimind/tokenization/chat_template.py",
        "ensure_ascii: bool = False,",
        "ensure_ascii: bool = True,",
        "tests/tokenization/test_chat_template.py",
    ),
    Mutation(
        "BPE merges digits",
        "minimind/tokenization/training.py",
        r"\p{L}+|\p{N}| ?",
        r"\p{L}+|\p{N}+| ?",
        "tests/tokenization/test_training.py::test_words_are_split_as_qwen2_splits_them",
    ),
    Mutation(
        "<think> and tool calls vanish from decoded text",
        "minimind/tokenization/training.py",
        'token["special"] = token["content"] not in MARKUP_TOKENS',
        'token["special"] = True',
        "tests/tokenization/test_training.py::test_markup_stays_visible",
    ),
    # training: which run goes on
    Mutation(
        "other micro-batches are another run",
        "minimind/training/identity.py",
        '"fused", "micro_batches", "micro_tokens", "recompute")',
        '"fused", "micro_batches", "recompute")',
        "tests/training/test_pretrain.py::test_a_run_resumes_with_other_micro_batches",
    ),
    Mutation(
        "the place in the data is one of micro-batches of one size",
        "minimind/data/loader.py",
        '"seq_len": self.seq_len,\n            "shuffle"',
        '"seq_len": self.seq_len,\n            "rows": self.rows,\n            "shuffle"',
        "tests/data/test_loader.py::test_a_step_has_the_same_rows_in_other_micro_batches",
    ),
    Mutation(
        "the place in a rollout is counted in micro-batches of another size",
        "minimind/training/rl/loader.py",
        "self._taken = done * self.shape.micro_batches",
        'self._taken = state["taken"]',
        "tests/training/test_grpo.py::test_a_run_resumes_with_other_micro_batches",
    ),
    Mutation(
        "the run that differs in most is called near",
        "minimind/training/run_folder.py",
        "path, difference = min(reversed(candidates)",
        "path, difference = max(reversed(candidates)",
        "tests/training/test_run_folder.py::test_a_new_run_names_the_most_similar_unfinished_run",
    ),
    Mutation(
        "a lengthened run begins inside the cooldown",
        "minimind/training/checkpoint.py",
        "[:-keep] if step_of(folder) != branch)",
        "[:-keep])",
        "tests/training/test_lengthen.py::test_a_checkpoint_before_the_cooldown_is_kept",
    ),
    Mutation(
        "the rate jumps to the longer run's curve",
        "minimind/training/optim.py",
        "share = min(1.0, (step - takeover + 1) / self.warmup)",
        "share = 1.0",
        "tests/training/test_lengthen.py::test_a_fallen_rate_rises_to_the_longer_run_s_curve",
    ),
    Mutation(
        "a run whose model was moved is another one",
        "minimind/training/identity.py",
        "(side.split()[-1] for side in (before, now))",
        "(side for side in (before, now))",
        "tests/training/test_run_folder.py",
    ),
    Mutation(
        "a flag that says what the data decided makes another run",
        "minimind/training/identity.py",
        "return first == second",
        "return False",
        "tests/training/test_run_folder.py",
    ),
    Mutation(
        "a tokenizer is another one by its size alone",
        "minimind/tokenization/tokenizer.py",
        "if not new and tokenizer.fingerprint != trained_with.fingerprint:",
        "if not new and tokenizer.vocab_size != trained_with.vocab_size:",
        "tests/training/test_references.py::test_every_stage_refuses_another_tokenizer_of_the_same_size",
    ),
    Mutation(
        "the tokenizer in the folder of a .pth is not asked",
        "minimind/tokenization/tokenizer.py",
        "folder = weights if weights.is_dir() else weights.parent\n    return load_tokenizer(folder) if",
        "folder = weights\n    return load_tokenizer(folder) if",
        "tests/training/test_references.py::test_every_stage_refuses_another_tokenizer_of_the_same_size",
    ),
    Mutation(
        "an adapter goes on a model of another tokenizer",
        "minimind/inference/loading.py",
        "if own is not None and args.lora is not None:",
        "if own is not None and args.lora is None:",
        "tests/training/test_references.py::test_every_command_refuses_another_tokenizer",
    ),
    Mutation(
        "a run goes on under a teacher that was trained anew",
        "minimind/training/job.py",
        "self.references[name] = fingerprint(weights).split()[-1]",
        "self.references[name] = weights.name",
        "tests/training/test_references.py::test_references_of_a_run_are_identified_by_their_weights",
    ),
    Mutation(
        "a run from before fingerprints of tokenizers were noted is lost",
        "minimind/training/identity.py",
        "return {**later, **old,",
        "return {**old,",
        "tests/training/test_references.py::test_another_tokenizer_makes_another_run_except_for_old_runs",
    ),
    Mutation(
        "Ctrl-C while a script imports is an exception",
        "minimind/utils/startup.py",
        "signal.signal(signal.SIGINT, _leave)",
        "signal.signal(signal.SIGINT, signal.default_int_handler)",
        "tests/utils/test_startup.py",
    ),
    Mutation(
        "the built-in conversations are made beside --data",
        "train/sft.py",
        "builtin = () if data else make(args.cache_dir, console)",
        "builtin = make(args.cache_dir, console)",
        "tests/training/test_references.py::test_built_in_data_are_not_made_when_data_are_named",
    ),
    # training
    Mutation(
        "micro-batches are averaged, not summed over the step's targets",
        "minimind/training/trainer.py",
        "loss, aux = loss / weight,",
        "loss, aux = loss / (batch.global_weight * len(batches)),",
        "tests/training/test_reason.py::test_loss_is_divided_by_the_weighted_sum_however_it_is_accumulated",
    ),
    Mutation(
        "gradients of ranks are averaged, though each is a part of the sum",
        "minimind/training/trainer.py",
        "self.scaler.scaled((loss + aux) * ranks).backward()",
        "self.scaler.scaled(loss + aux).backward()",
        "tests/training/test_grpo.py::test_curve_of_two_processes_is_that_of_one",
    ),
    Mutation(
        "gradients are clipped before they are divided by the loss's scale",
        "minimind/training/trainer.py",
        "            self.scaler.unscale()\n            norm, *group_norms = self._clip()\n",
        "            norm, *group_norms = self._clip()\n            self.scaler.unscale()\n",
        "tests/training/test_loss_scaling.py",
    ),
    Mutation(
        "a resumed run begins with the first scale again",
        "minimind/training/trainer.py",
        'self.scaler.load_state_dict(state.get("scaler", {}))',
        "self.scaler.load_state_dict({})",
        "tests/training/test_loss_scaling.py",
    ),
    Mutation(
        "steps that grow do not move the schedule",
        "minimind/training/trainer.py",
        "self.schedule.factor(self.plan.place_in_schedule(self.step))",
        "self.schedule.factor(self.step)",
        "tests/training/test_recipe.py::test_a_run_with_growing_steps_logs_its_tokens_and_its_rate",
    ),
    Mutation(
        "all steps have the micro-batches of a whole one",
        "minimind/training/batches.py",
        "                return self.micro_batches * tokens // self.step_tokens",
        "                return self.micro_batches",
        "tests/training/test_recipe.py::test_a_run_with_growing_steps_logs_its_tokens_and_its_rate",
    ),
    Mutation(
        "the mean squares of rows are never updated",
        "minimind/training/muon.py",
        ".lerp_(squares, 1 - beta)",
        ".lerp_(squares, 0)",
        "tests/training/test_muon.py::test_scaled_rows_move_alike",
    ),
    Mutation(
        "fewer iterations begin at the Frobenius norm",
        "minimind/training/muon.py",
        "if i == 0 and iterations < TORCHS_ITERATIONS:",
        "if i == 0 and iterations < 0:",
        "tests/training/test_muon.py::test_rounding_is_no_larger_than_torchs",
    ),
    Mutation(
        "Muon ignores its number of iterations",
        "minimind/training/muon.py",
        'orthogonalise(updates, plan, group["ns_steps"])',
        "orthogonalise(updates, plan, 5)",
        "tests/training/test_muon.py::test_scaled_rows_move_alike",
    ),
    Mutation(
        "cautious decay is plain decay",
        "minimind/training/muon.py",
        "        if self.cautious:",
        "        if self.cautious is None:",
        "tests/training/test_muon.py::test_cautious_decay_only_where_the_update_agrees",
    ),
    Mutation(
        "the time to a loss has the evaluations in it",
        "bench/training/loss_curves.py",
        "points.append(point_of(row, elapsed - evaluating))",
        "points.append(point_of(row, elapsed))",
        "tests/test_bench_time_to_loss.py::test_a_command_is_timed_without_its_evaluations",
    ),
    Mutation(
        "upstream's recipe warms up",
        "bench/training/recipes.py",
        "upstream_rate(s.lr, number + 1, s.steps)",
        "upstream_rate(s.lr, number + 1, s.steps) * min(1.0, (number + 1) / 2)",
        "tests/test_bench_time_to_loss.py::test_upstreams_recipe_takes_the_steps_of_its_script",
    ),
    Mutation(
        "the average of the weights is not kept up",
        "minimind/training/trainer.py",
        "                self.average.update()",
        "                pass",
        "tests/training/test_averaging.py::test_recorded_figures_are_those_of_the_saved_average",
    ),
    Mutation(
        "a resumed run's average forgets how many steps are in it",
        "minimind/training/trainer.py",
        'self.average.updates = state["averaged"]',
        "self.average.updates = 0",
        "tests/training/test_averaging.py::test_killed_and_started_again_the_average_is_the_same_to_the_bit",
    ),
    Mutation(
        "the weights stay the average after it was measured",
        "minimind/training/optim.py",
        "            value.copy_(kept)",
        "            weight.copy_(value)",
        "tests/training/test_averaging.py::test_the_average_follows_its_formula",
    ),
    Mutation(
        "the reference of a run that trains an adapter has the adapter",
        "minimind/training/rl/stage.py",
        "            with adapters_off(self.model):",
        "            if adapters_off(self.model):",
        "tests/training/test_adapters.py::test_answers_were_compared_with_the_base",
    ),
    Mutation(
        "an adapter that was off stays off",
        "minimind/lora.py",
        "            linear.active = active",
        "            linear.active = linear.active",
        "tests/training/test_adapters.py::test_an_adapter_off_is_its_base_until_the_end",
    ),
    Mutation(
        "DoRA's lengths are rounded where weights are sharded",
        "minimind/training/parallel.py",
        "        rounded = exact",
        "        pass",
        "tests/test_lora.py::test_replicated_and_sharded_adapters_train_as_one_does",
    ),
    Mutation(
        "a resumed run draws other random numbers",
        "minimind/training/trainer.py",
        'torch.set_rng_state(state["rng"])',
        'torch.manual_seed(state["step"])',
        "tests/training/test_lora.py::test_killed_and_started_again_the_curve_is_the_same_to_the_bit",
    ),
    Mutation(
        "a resumed run begins its data anew",
        "minimind/training/trainer.py",
        'self.loader.load_state({**state["loader"], "step": state["step"]})',
        "self.loader.state()",
        "tests/training/test_lora.py::test_killed_and_started_again_the_curve_is_the_same_to_the_bit",
    ),
    Mutation(
        "what was fetched ahead is lost on resuming",
        "minimind/training/batches.py",
        "        return self._position\n",
        "        return self.loader.state()\n",
        "tests/training/test_batches.py",
    ),
    Mutation(
        "the optimizer's state is not read back",
        "minimind/training/optim.py",
        "set_optimizer_state_dict(model, self.parts, state, options=from_rank_0())",
        "set_optimizer_state_dict(model, self.parts, self.state_dict(model), options=from_rank_0())",
        "tests/training/test_optim.py",
    ),
    Mutation(
        "gradients are not clipped",
        "minimind/training/trainer.py",
        "clip_grad_norm_(group, self.args.grad_clip)",
        "clip_grad_norm_(group, float('inf'))",
        "tests/training/test_trainer.py",
    ),
    Mutation(
        "an update of Muon is as large as its shorter side asks",
        "minimind/training/muon.py",
        "RMS * math.sqrt(max(self.rows, self.columns))",
        "RMS * math.sqrt(min(self.rows, self.columns))",
        "tests/training/test_optim.py",
    ),
    Mutation(
        "Muon takes the router",
        "minimind/training/optim.py",
        ' and "router" not in name',
        "",
        "tests/training/test_optim.py",
    ),
    Mutation(
        "the router scores in the compute dtype",
        "minimind/modeling.py",
        "self.router(flat.to(router_dtype)),",
        "self.router(flat).to(router_dtype),",
        "tests/test_modeling.py",
    ),
    Mutation(
        "a piece goes where most room is left",
        "minimind/data/packing.py",
        "left = length + (fitting & -fitting).bit_length() - 1",
        "left = length + fitting.bit_length() - 1",
        "tests/data/test_packing.py",
    ),
    Mutation(
        "a body that is no JSON gets another status",
        "minimind/serving/protocol.py",
        'error_body(400, "the body is not JSON"), 400)',
        'error_body(400, "the body is not JSON"), 422)',
        "tests/serving/test_errors.py",
    ),
    Mutation(
        "norm gains decay",
        "minimind/training/optim.py",
        '"weight_decay": 0.0}',
        '"weight_decay": weight_decay}',
        "tests/training/test_optim.py",
    ),
    Mutation(
        "Muon's matrices do not decay",
        "minimind/training/optim.py",
        "Muon(muon, lr, weight_decay, momentum",
        "Muon(muon, lr, 0.0, momentum",
        "tests/training/test_optim.py",
    ),
    Mutation(
        "a critic's matrices are left to AdamW",
        "minimind/training/optim.py",
        '".layers." in f".{name}"',
        'name.startswith("layers.")',
        "tests/training/test_optim.py",
    ),
    Mutation(
        "the cosine ends a step too late",
        "minimind/training/optim.py",
        "progress = (step - warmup + 1) / max(1, steps - warmup)",
        "progress = (step - warmup) / max(1, steps - warmup)",
        "tests/training/test_optim.py",
    ),
    Mutation(
        "an old checkpoint too many is deleted",
        "minimind/training/checkpoint.py",
        "list_checkpoints(run)[:-keep]",
        "list_checkpoints(run)[: 1 - keep]",
        "tests/training/test_checkpoint.py",
    ),
    Mutation(
        "a resumed run keeps the lines behind its checkpoint",
        "minimind/training/run_folder.py",
        "        os.truncate(path, size)",
        "        os.truncate(path, there)",
        "tests/training/test_run_folder.py",
    ),
    Mutation(
        "bits per byte are nats per byte",
        "minimind/training/evaluation.py",
        "total / math.log(2) / max(1, text_bytes)",
        "total / max(1, text_bytes)",
        "tests/training/test_pretrain.py::test_recorded_held_out_figures_are_those_of_the_saved_model",
    ),
    Mutation(
        "an answer's targets stand one token late",
        "minimind/training/rl/loader.py",
        "first = start + len(a.prompt_ids) - 1",
        "first = start + len(a.prompt_ids) - 2",
        "tests/training/rl/test_rollouts.py",
    ),
    Mutation(
        "a step takes more than the data has",
        "minimind/training/batches.py",
        'taken = step if kept == "usual" else kept // row',
        "taken = step",
        "tests/training/test_job.py",
    ),
    # objectives
    Mutation(
        "label smoothing adds what it should weigh against",
        "minimind/objectives/preference.py",
        "label_smoothing * F.logsigmoid(-logit)",
        "label_smoothing * F.logsigmoid(logit)",
        "tests/objectives/test_preference.py",
    ),
    Mutation(
        "IPO aims at twice the gap",
        "minimind/objectives/preference.py",
        "(chosen - rejected - 1 / (2 * beta)).square()",
        "(chosen - rejected - 1 / beta).square()",
        "tests/objectives/test_preference.py",
    ),
    Mutation(
        "DPO's margin forgets the reference of the rejected answer",
        "minimind/objectives/preference.py",
        "return self.chosen - self.reference_chosen, self.rejected - self.reference_rejected",
        "return self.chosen - self.reference_chosen, self.rejected - self.reference_chosen",
        "tests/objectives/test_preference.py",
    ),
    Mutation(
        "the clip takes the gradient of good tokens that became unlikely",
        "minimind/objectives/surrogates.py",
        "tokens.advantages >= 0, log_ratio.clamp(max=high),",
        "tokens.advantages >= 0, log_ratio.clamp(min=low, max=high),",
        "tests/objectives/test_surrogates.py",
    ),
    Mutation(
        "GSPO's ratio is not the length's root",
        "minimind/objectives/surrogates.py",
        "means = at.sums(log_ratio) / at.lengths().clamp(min=1)",
        "means = at.sums(log_ratio)",
        "tests/objectives/test_surrogates.py",
    ),
    Mutation(
        "the KL is measured the other way round",
        "minimind/objectives/surrogates.py",
        "x = reference - log_probs",
        "x = log_probs - reference",
        "tests/objectives/test_surrogates.py",
    ),
    Mutation(
        "the mean over answers is a sum over tokens",
        "minimind/objectives/policy.py",
        "losses = losses / at.spread(at.lengths())",
        "losses = losses + 0 * at.spread(at.lengths())",
        "tests/objectives/test_policy.py tests/objectives/test_surrogates.py",
    ),
    Mutation(
        "advantages leak into the sample before",
        "minimind/objectives/advantages.py",
        "torch.full_like(values, gamma * lam).masked_fill(last, 0)",
        "torch.full_like(values, gamma * lam)",
        "tests/objectives/test_advantages.py",
    ),
    Mutation(
        "an episode that was cut off has no future",
        "minimind/objectives/advantages.py",
        "gamma * torch.where(last, after, following)",
        "gamma * torch.where(last, 0.0, following)",
        "tests/objectives/test_advantages.py",
    ),
    Mutation(
        "a group's deviation is divided by n",
        "minimind/objectives/advantages.py",
        "(squares / (sizes - 1).clamp(min=1)).sqrt()",
        "(squares / sizes.clamp(min=1)).sqrt()",
        "tests/objectives/test_advantages.py",
    ),
    Mutation(
        "a critic that knows nothing yet judges by the place",
        "train/ppo.py",
        "gae(rewards, values + shift,",
        "gae(rewards, values + 0 * shift,",
        "tests/training/test_ppo_long.py",
    ),
    Mutation(
        "the values are shifted by what all states miss",
        "minimind/objectives/advantages.py",
        "- values.double()[first].mean()",
        "- values.double().mean()",
        "tests/objectives/test_advantages.py",
    ),
    Mutation(
        "masked answers are learnt from",
        "minimind/training/rl/loader.py",
        "if not a.masked]",
        "if not a.masked or a.ids.size]",
        "tests/training/rl/test_rollouts.py",
    ),
    Mutation(
        "a critic's rate is forgotten",
        "minimind/training/optim.py",
        "peaks.append(peak * rate)",
        "peaks.append(peak)",
        "tests/training/test_optim.py",
    ),
    Mutation(
        "the running deviation forgets that the mean moved",
        "minimind/rewards/compose.py",
        "self.squares += shift * shift * self.count * len(rewards) / total",
        "self.squares += 0.0",
        "tests/rewards/test_statistics.py",
    ),
    Mutation(
        "the critic's clip takes the smaller error",
        "minimind/objectives/policy.py",
        "return torch.maximum(plain, bound),",
        "return torch.minimum(plain, bound),",
        "tests/objectives/test_policy.py",
    ),
    Mutation(
        "what was seen long ago counts as much as before",
        "minimind/objectives/advantages.py",
        "2 ** (-moved / self.half)",
        "2 ** (moved / self.half)",
        "tests/objectives/test_advantages.py",
    ),
    Mutation(
        "scores are kept apart instead of around 0",
        "minimind/objectives/preference.py",
        "centering * (chosen + rejected).square()",
        "centering * (chosen - rejected).square()",
        "tests/objectives/test_preference.py",
    ),
    Mutation(
        "the gradient shrinks as the temperature grows",
        "minimind/objectives/next_token.py",
        "share = (1 - options.alpha) * options.temperature**2",
        "share = (1 - options.alpha) * options.temperature",
        "tests/objectives/test_next_token.py",
    ),
    # rewards
    Mutation(
        "a percentage is not a hundredth",
        "minimind/rewards/rules.py",
        'return value / 100 if digits.endswith("%") else value',
        "return value",
        "tests/rewards/test_rules.py",
    ),
    Mutation(
        "a minus after a Chinese character is a hyphen",
        "minimind/rewards/rules.py",
        r"(?<![^\W\u4e00-\u9fff])",
        r"(?<!\w)",
        "tests/rewards/test_rules.py",
    ),
    Mutation(
        "made-up arguments of a tool are right",
        "minimind/rewards/rules.py",
        'not schema.get("additionalProperties", False)',
        'not schema.get("additionalProperties", True)',
        "tests/rewards/test_rules.py",
    ),
    Mutation(
        "markers may stand there any number of times",
        "minimind/rewards/rules.py",
        "sample.text.count(marker) == 1 for",
        "sample.text.count(marker) >= 1 for",
        "tests/rewards/test_rules.py",
    ),
    Mutation(
        "rewards are added up without their weights",
        "minimind/rewards/compose.py",
        "total += part.weight * np.where",
        "total += np.where",
        "tests/rewards/test_compose.py",
    ),
    # environments, and what learns in them
    Mutation(
        "what tools said is trained on",
        "minimind/training/rl/loader.py",
        "targets[first : first + len(a.ids)] = a.targets",
        "targets[first : first + len(a.ids)] = a.ids",
        "tests/environments/test_episodes.py::test_results_of_tools_are_no_targets_and_get_no_gradient",
    ),
    Mutation(
        "the worse conversations of a group are learnt",
        "minimind/objectives/advantages.py",
        "    return centred / ((squares / (sizes - 1)",
        "    return -centred / ((squares / (sizes - 1)",
        _AGENTS,
        slow=True,
    ),
    Mutation(
        "every token of a conversation counts as written",
        "minimind/environments/episodes.py",
        "episode.sampled += [False] * len(ids)",
        "episode.sampled += [True] * len(ids)",
        "tests/environments/test_episodes.py::test_conversations_are_those_that_the_template_renders",
    ),
    Mutation(
        "a tool's words can end its turn",
        "minimind/environments/turns.py",
        "return name[0][0] + _GUARD + name[0][1:]",
        "return name[0]",
        "tests/environments/test_turns.py",
    ),
    Mutation(
        "the token that ends a turn is left out",
        "minimind/environments/episodes.py",
        "turn.episode.ids += turn.drawn",
        "turn.episode.ids += turn.drawn[:-1]",
        "tests/environments/test_episodes.py::test_log_probabilities_are_the_trainers_over_whole_conversations",
    ),
    Mutation(
        "samples of one prompt draw the same second turn",
        "minimind/environments/episodes.py",
        "(number << 32) + episode.sample",
        "number << 32",
        "tests/environments/test_episodes.py::test_the_samples_of_a_prompt_draw_their_own_turns",
    ),
    Mutation(
        "made-up arguments are called",
        "minimind/rewards/rules.py",
        'if set(value) - set(properties) and not schema.get("additionalProperties", False):',
        "if False:",
        "tests/environments/test_tools.py",
    ),
    Mutation(
        "an answer may list all that there is",
        "minimind/environments/rewards.py",
        "return len(text) <= len(reference) + _MAX_EXTRA and ",
        "return ",
        "tests/environments/test_rewards.py",
    ),
    Mutation(
        "a held-out task is worded as a training task",
        "minimind/environments/builtin/tasks.py",
        "wording = wordings[-1] if new else",
        "wording = wordings[0] if new else",
        "tests/environments/test_tasks.py::test_held_out_values_and_wordings_are_apart",
    ),
    Mutation(
        "the weak agent has all wordings",
        "minimind/environments/builtin/tasks.py",
        "tasks(few_wordings=True))",
        "tasks())",
        "tests/environments/test_tasks.py::test_weak_conversations_do_a_third_of_their_tasks",
    ),
    # inference
    Mutation(
        "a prompt's last token is taken from the cache, so that nothing is drawn from it",
        "minimind/inference/scheduler.py",
        "full = (len(sequence.tokens) - 1) // self.page_size",
        "full = len(sequence.tokens) // self.page_size",
        "tests/inference/test_scheduler.py",
    ),
    Mutation(
        "samples write into the page that they share",
        "minimind/inference/scheduler.py",
        "if not at_boundary and self.pool.references(sequence.pages[-1]) == 1:",
        "if not at_boundary:",
        "tests/inference/test_scheduler.py",
    ),
    Mutation(
        "a page is found whatever stands before it",
        "minimind/inference/scheduler.py",
        'hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16)',
        'hashlib.blake2b(array("q", tokens).tobytes(), digest_size=16)',
        "tests/inference/test_cache.py",
    ),
    Mutation(
        "a chain of pages is evicted from its beginning",
        "minimind/inference/scheduler.py",
        "for page in reversed(pages):",
        "for page in pages:",
        "tests/inference/test_cache.py",
    ),
    Mutation(
        "weights of 8 bits are rounded down",
        "minimind/inference/decode/int8.py",
        "return (x * inverse).round(), largest / LARGEST",
        "return (x * inverse).floor(), largest / LARGEST",
        "tests/inference/decode/test_int8.py",
    ),
    Mutation(
        "the bound of normed keys forgets how long a head is",
        "minimind/inference/decode/kv_cache.py",
        "weight.float().abs().amax() * dim**0.5)",
        "weight.float().abs().amax())",
        "tests/inference/decode/test_kv_dtype.py",
    ),
    Mutation(
        "new weights read the old ones' keys",
        "minimind/inference/engine.py",
        "            self._scheduler.preempt(sequence)\n        self._pool.forget()",
        "            self._scheduler.preempt(sequence)",
        "tests/inference/test_engine.py",
    ),
    Mutation(
        "all samples of a request are the same",
        "minimind/inference/request_state.py",
        "return self.seed if index == 0 else derive_seed(self.seed, index)",
        "return self.seed",
        "tests/inference/test_engine.py",
    ),
    Mutation(
        "an answer is one token longer than allowed",
        "minimind/inference/request_state.py",
        "len(sequence.tokens) >= self.request.limit",
        "len(sequence.tokens) > self.request.limit",
        "tests/inference/test_engine_service.py",
    ),
    Mutation(
        "a late host forgets what the device has moved on before it copies over it",
        "minimind/inference/engine.py",
        "            batch.advance()\n",
        "",
        "tests/inference/test_late.py",
    ),
    Mutation(
        "what a row drew after its sample's end is given to it",
        "minimind/inference/engine.py",
        "            if sequence.ended:\n                continue\n",
        "",
        "tests/inference/test_late.py::test_a_launched_step_keeps_its_pages_until_it_is_read",
    ),
    Mutation(
        "a sample at its limit runs a step more where the host is late",
        "minimind/inference/engine.py",
        "for sequence in self._batch.at_limit():",
        "for sequence in self._batch.at_limit()[:0]:",
        "tests/inference/test_late.py::test_a_sequence_at_its_limit_runs_no_extra_step",
    ),
    Mutation(
        "a late host preempts before it reads who has ended",
        "minimind/inference/engine.py",
        "if self._scheduler.short_of_pages():",
        "if False:",
        "tests/inference/test_late.py::test_an_ended_sequence_causes_no_preemption",
    ),
    Mutation(
        "a moved row leaves its token behind",
        "minimind/inference/batch.py",
        'else ("token", "log_prob")',
        'else ("log_prob",)',
        "tests/inference/test_late.py::test_a_sequence_at_its_limit_runs_no_extra_step",
    ),
    Mutation(
        "a cancel does not wait for what is drawn",
        "minimind/inference/engine.py",
        "        if request_id in self._requests:\n            self._read_now()\n",
        "",
        "tests/inference/test_late.py::test_cancelling_reads_unread_tokens",
    ),
    Mutation(
        "a kept engine samples from the weights of the last evaluation",
        "minimind/inference/generate.py",
        "        engine.refresh_weights()\n",
        "",
        "tests/training/test_generate.py::test_a_kept_engine_follows_the_weights",
    ),
    Mutation(
        "a preempted sample draws its first numbers again",
        "minimind/inference/batch.py",
        'values["offset"][row] = len(sequence.tokens) - sequence.prompt_length',
        'values["offset"][row] = 0',
        "tests/inference/test_engine_service.py",
    ),
    Mutation(
        "a chunk's tokens do not see themselves",
        "minimind/inference/prefill.py",
        ".tril(keys - queries)",
        ".tril(keys - queries - 1)",
        "tests/inference/test_prefill.py",
    ),
    Mutation(
        "a prompt's token sees the one behind it",
        "minimind/inference/prefill.py",
        "page * page_size + position % page_size, table, position + 1)",
        "page * page_size + position % page_size, table, position + 2)",
        "tests/inference/test_prefill.py",
    ),
    Mutation(
        "a penalty makes unlikely tokens likelier",
        "minimind/inference/decode/reference.py",
        "torch.where(logits > 0, logits / factor, logits * factor)",
        "logits / factor",
        "tests/inference/decode/test_sampling.py",
    ),
    Mutation(
        "top-p is a share of all tokens, not of those that top-k left",
        "minimind/inference/decode/reference.py",
        "mass = torch.where(ordered >= ordered.gather(-1, k[:, None] - 1), mass, 0.0)",
        "mass = mass.clone()",
        "tests/inference/decode/test_sampling.py",
    ),
    Mutation(
        "a stop string is found within a token alone",
        "minimind/inference/request_state.py",
        "cut = len(held) - overlap(held, self._stops)",
        "cut = len(held)",
        "tests/inference/test_detokenizer.py",
    ),
    Mutation(
        "packed weights have up before gate",
        "minimind/inference/decode/step.py",
        "weight = weight.unflatten(-2, (2, -1))",
        "weight = weight.unflatten(-2, (2, -1)).flip(-3)",
        "tests/inference/decode/test_packing.py",
    ),
    Mutation(
        "the stop token is part of the answer",
        "minimind/inference/generate.py",
        "return ids[:-1] if ids and ids[-1] in stop_ids else ids",
        "return ids",
        "tests/training/test_generate.py",
    ),
    Mutation(
        "bits per byte are nats per byte",
        "minimind/evaluation/perplexity.py",
        "nats / math.log(2) / num_bytes",
        "nats / num_bytes",
        "tests/evaluation/test_perplexity.py",
    ),
    # serving
    Mutation(
        "any key opens the server",
        "minimind/serving/app.py",
        'if scheme.lower() != "bearer" or not',
        'if scheme.lower() != "bearer" and not',
        "tests/serving/test_errors.py::test_the_key_is_required",
    ),
    Mutation(
        "a request of the wrong shape is the server's failure",
        "minimind/serving/protocol.py",
        "JSONResponse(error_body(422, message, param), 422)",
        "JSONResponse(error_body(500, message, param), 500)",
        "tests/serving/test_errors.py::test_malformed_bodies",
    ),
    Mutation(
        "an error has several lines",
        "minimind/serving/protocol.py",
        'return " ".join(text.encode(errors="replace").decode().split())',
        'return text.encode(errors="replace").decode()',
        "tests/serving/test_errors.py::test_a_message_is_one_line_of_utf8",
    ),
    Mutation(
        "an escaped quote ends a tool call's string",
        "minimind/serving/chat_format.py",
        "closes = character == '\"' and not self._escaped",
        "closes = character == '\"'",
        "tests/serving/test_reply.py",
    ),
    # export
    Mutation(
        "GGUF's queries and keys are rotated as other pairs",
        "minimind/export/gguf.py",
        "return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)",
        "return weight.unflatten(0, (heads, 2, -1)).flatten(0, 2)",
        "tests/export/test_gguf.py",
    ),
    Mutation(
        "llama.cpp applies YaRN's factor twice",
        "minimind/export/gguf.py",
        "writer.add_rope_scaling_attn_factors(own / paper)",
        "writer.add_rope_scaling_attn_factors(own)",
        "tests/export/test_gguf.py",
    ),
    Mutation(
        "the router is quantized",
        "minimind/export/gguf.py",
        'if tensor.ndim == 1 or name.endswith(".mlp.gate"):',
        "if tensor.ndim == 1:",
        "tests/export/test_gguf.py",
    ),
    Mutation(
        "control tokens are written as text",
        "minimind/export/gguf.py",
        'kinds.CONTROL if added["special"] else kinds.USER_DEFINED',
        "kinds.USER_DEFINED",
        "tests/export/test_gguf.py",
    ),
    Mutation(
        "other blocks are asked for than were promised",
        "minimind/export/gguf.py",
        'str(path), "Q4_K_M"]',
        'str(path), "Q4_0"]',
        "tests/export/test_command.py::test_a_quantizer_on_the_path",
    ),
    Mutation(
        "Granite's attention is not scaled",
        "minimind/export/hf.py",
        '"attention_multiplier": config.head_dim**-0.5,',
        '"attention_multiplier": 1.0,',
        "tests/export/test_hf.py::test_the_same_logits_and_greedy_tokens",
    ),
    Mutation(
        "the router has not upstream's name",
        "minimind/weights.py",
        'out[base.replace("mlp.router.", "mlp.gate.")] = tensor',
        "out[base] = tensor",
        "tests/test_weights.py",
    ),
    # bench
    Mutation(
        "a scan of rates ends without a higher loss below its lowest",
        "bench/rates/fit.py",
        "for rate in (best * 2, best / 2) if",
        "for rate in (best * 2,) if",
        "tests/test_bench_transfer.py::test_scan_ends_with_the_lowest_between_two",
    ),
    # what users reported
    Mutation(
        "an adapter takes whatever lies under its base's name",
        "minimind/lora_files.py",
        "return None if same else",
        "return None if expected.split()[0] == actual.split()[0] else",
        "tests/test_lora_files.py",
    ),
    Mutation(
        "nobody is told that a base is known by its name alone",
        "minimind/inference/loading.py",
        "if args.lora is None and names_base_only(adapter_folder(lora)):",
        "if False:",
        "tests/export/test_command.py::test_an_assumed_base_model_is_reported",
    ),
    Mutation(
        "rows of padding can be drawn",
        "minimind/modeling.py",
        "return weight if self.config.tokenizer_size is None else weight[: self.config.num_tokens]",
        "return weight",
        "tests/inference/test_padded.py",
    ),
    Mutation(
        "a native step draws from rows of padding",
        "minimind/inference/runner.py",
        "self.model = Model(config or source.config)",
        "self.model = Model(source.config)",
        "tests/inference/test_padded.py",
    ),
    Mutation(
        "llama.cpp gets the rows of padding as they are",
        "minimind/export/gguf.py",
        "if tokens == len(rows):",
        "if tokens <= len(rows):",
        "tests/export/test_gguf.py::test_padding_is_never_sampled",
    ),
    Mutation(
        "transformers draws from rows of padding",
        "minimind/export/hf.py",
        "range(tokenizer.vocab_size, config.vocab_size)",
        "range(config.vocab_size, config.vocab_size)",
        "tests/training/test_padded.py::test_export_keeps_the_rows_and_opens_again",
    ),
    Mutation(
        "a call that was cut ends its conversation",
        "minimind/serving/chat_format.py",
        "return limit_depth(value) if isinstance(value, dict) else text\n    except (ValueError, RecursionError):\n"
        "        return text",
        "return limit_depth(value) if isinstance(value, dict) else text\n    except RecursionError:\n"
        "        return text",
        "tests/serving/test_errors.py",
    ),
    Mutation(
        "null is a value of its own",
        "minimind/serving/protocol.py",
        "return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value",
        "return value",
        "tests/serving/test_errors.py::test_neutral_values_are_accepted tests/serving/test_clients.py",
    ),
    Mutation(
        "other servers' parameters count whatever they say",
        "minimind/serving/protocol.py",
        "if k in own or k not in NEUTRAL or v != NEUTRAL[k]}",
        "if k in own or k not in NEUTRAL}",
        "tests/serving/test_errors.py::test_invalid_chat_requests_name_the_error",
    ),
    Mutation(
        "beside a JSON format the model cannot call its tools",
        "minimind/serving/grammar.py",
        "start: calls | json",
        "start: json",
        "tests/serving/test_grammar.py::test_a_call_may_take_the_place_of_json_and_nothing_else",
    ),
    Mutation(
        "a call's marker inside an enforced JSON answer begins a call",
        "minimind/serving/routes.py",
        '"enforced": enforced}',
        '"enforced": False}',
        "tests/serving/test_chat.py::test_markers_inside_json_are_text",
    ),
    Mutation(
        "a route that only OpenAI has is not told from a wrong path",
        "minimind/serving/protocol.py",
        "elif kind in MISSING:",
        "elif kind in ():",
        "tests/serving/test_errors.py::test_what_openai_has_and_this_server_does_not_is_said",
    ),
    Mutation(
        "a web page need not say that it sends JSON",
        "minimind/serving/app.py",
        'if "origin" in headers:',
        "if False:",
        "tests/serving/test_errors.py::test_json_without_its_content_type_is_json",
    ),
    Mutation(
        "a title is read as a formula",
        "minimind/utils/display.py",
        'return text.replace("$", r"\$")',
        "return text",
        "tests/utils/test_display.py",
    ),
    Mutation(
        "a picture may fail a run",
        "minimind/utils/display.py",
        "        except Exception as problem:\n            pictures",
        "        except MemoryError as problem:\n            pictures",
        "tests/utils/test_display.py",
    ),
    Mutation(
        "a tracker may fail a run",
        "minimind/training/metrics.py",
        "            action()\n        except Exception as problem:",
        "            action()\n        except MemoryError as problem:",
        "tests/training/test_run_folder.py",
    ),
    Mutation(
        "a server of this machine is sought behind a proxy",
        "minimind/serving/web_client.py",
        "trust_env=not _is_local",
        "trust_env=True or _is_local",
        "tests/serving/test_web.py",
    ),
    Mutation(
        "pages of this machine may not call",
        "minimind/serving/app.py",
        '"allow_origin_regex": LOOPBACK}',
        '"allow_origin_regex": None}',
        "tests/serving/test_errors.py::test_local_pages_may_call",
    ),
    Mutation(
        "a page of any host that begins with localhost may call",
        "minimind/serving/app.py",
        r'\[::1\])(:\d+)?"',
        r'\[::1\])(.*)?"',
        "tests/serving/test_errors.py::test_foreign_pages_may_not_call",
    ),
    Mutation(
        "--out=~/x is a folder called ~",
        "minimind/utils/startup.py",
        'argument = f"{flag}=" * bool(equals) + full',
        "argument = argument",
        "tests/utils/test_startup.py",
    ),
    Mutation(
        "a home that is not there becomes a folder",
        "minimind/utils/startup.py",
        "if full == path and not os.path.exists(begins[0]):",
        "if False:",
        "tests/utils/test_startup.py",
    ),
    Mutation(
        "a reward that returns too few numbers is asked again",
        "minimind/rewards/compose.py",
        "if len(values) != count:",
        "if len(values) > count:",
        "tests/rewards/test_compose.py",
    ),
    Mutation(
        "words are rewards",
        "minimind/rewards/compose.py",
        "if isinstance(value, Real):",
        "if isinstance(value, Real | str):",
        "tests/rewards/test_compose.py",
    ),
)


@dataclass(frozen=True)
class Result:
    """outcome: caught, NOT CAUGHT, or why the mutation says nothing; test: which failed; reason: its first line."""

    mutation: Mutation
    outcome: str
    seconds: float
    test: str = ""
    reason: str = ""


def main() -> int:
    args = arguments()
    chosen = [m for m in MUTATIONS if args.only in f"{m} {m.tests}" and (args.slow or not m.slow)]
    if args.list:
        print("\n".join(f"{m}\n    {m.tests}" for m in chosen))
        return 0
    if not chosen:
        raise SystemExit(
            f"--only {args.only}: no mutation's file, defect or tests contain it, or only slow ones (--slow)"
        )
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copy = Path(folder) / "copy"
        copy_tree(copy)
        check_imports(copy)
        if args.check_clean and not is_clean(copy, chosen):
            return 1
        results = run_all(copy, chosen, args.tests_all)
    missed = [r for r in results if r.outcome != "caught"]
    print(
        f"\n{len(results) - len(missed)} of {len(results)} mutations caught in {clock(sum(r.seconds for r in results))}"
    )
    for result in missed:
        print(f"{result.outcome}: {result.mutation}")
    return int(bool(missed))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PATTERN", default="", help="a part of a file, defect or test")
    parser.add_argument("--list", action="store_true", help="print the mutations and run nothing")
    parser.add_argument("--check-clean", action="store_true", help="first see the named tests pass, unmutated")
    parser.add_argument("--slow", action="store_true", help="also mutations that only slow tests notice")
    parser.add_argument("--tests-all", action="store_true", help="the whole suite each time: hours")
    return parser.parse_args()


def copy_tree(copy: Path) -> None:
    """The files as they are now, those not committed yet too, and the built libraries, which git ignores."""
    files = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(files, cwd=ROOT, capture_output=True, check=True).stdout
    for name in listed.decode().split("\0")[:-1]:
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    copy_libraries(copy)


def copy_libraries(copy: Path) -> None:
    for name in LIBRARIES:
        if (ROOT / name).is_file():
            shutil.copy2(ROOT / name, copy / name)


def environment(copy: Path) -> dict[str, str]:
    """PYTHONPATH goes before an editable installation of ROOT. No bytecode: an edit of the same size within a second
    would not be seen. A token cache of its own: what a mutation writes there must not outlive it."""
    cache = str(copy.parent / "cache")
    return {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "MINIMIND_CACHE": cache}


def check_imports(copy: Path) -> None:
    """The packages of the copy are imported, in its folder and elsewhere, as subprocesses of tests do."""
    code = "import bench, minimind, minimind.kernels.rope as r, tests; print(minimind.__file__, r.__file__)"
    for folder in (copy, copy.parent):
        answer = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env=environment(copy), capture_output=True, text=True
        )
        found = answer.stdout.split()
        if found != [str(copy / "minimind/__init__.py"), str(copy / "kernels/rope.py")]:
            raise SystemExit(f"not the copy is imported, but {found}\n{answer.stderr}")


def is_clean(copy: Path, mutations: Sequence[Mutation]) -> bool:
    """Whether all named tests, each once, pass as they are."""
    passed = True
    for slow in sorted({mutation.slow for mutation in mutations}):
        chosen = [mutation for mutation in mutations if mutation.slow == slow]
        names = dict.fromkeys(name for m in chosen for name in m.tests.split())
        once = [name for name in names if "::" not in name or name.split("::")[0] not in names]
        start = time.monotonic()
        code, failed = run_tests(copy, once, len(chosen) * LIMIT, "--maxfail=20", *marked(slow))
        print(f"unmutated: {'passed' if code == 0 else 'FAILED'} in {clock(time.monotonic() - start)}", flush=True)
        for kind, test, reason in failed:
            print(f"    {kind} {test}: {reason}")
        passed &= code == 0
    return passed


def marked(slow: bool) -> tuple[str, ...]:
    """pytest's flags for slow tests, which it leaves out otherwise."""
    return ("-m", "slow") if slow else ()


def run_all(copy: Path, mutations: Sequence[Mutation], tests_all: bool) -> list[Result]:
    results: list[Result] = []
    start = time.monotonic()
    for number, mutation in enumerate(mutations, 1):
        result = run_one(copy, mutation, tests_all)
        results.append(result)
        left = (time.monotonic() - start) / number * (len(mutations) - number)
        print(
            f"[{number}/{len(mutations)}] {result.outcome}  {result.seconds:.0f} s  ETA {clock(left)}  {mutation}",
            flush=True,
        )
        if result.test:
            print(f"    {result.test}: {result.reason}", flush=True)
    return results


def run_one(copy: Path, mutation: Mutation, tests_all: bool) -> Result:
    start = time.monotonic()
    times = (copy / mutation.file).read_text(encoding="utf-8").count(mutation.old)
    if times != 1:
        return Result(mutation, "old text not found" if times == 0 else f"old text found {times} times", 0.0)
    with mutated(copy, mutation) as problem:
        if problem:
            return Result(mutation, f"broken mutation ({problem})", time.monotonic() - start)
        tests, limit = (["tests/"], 10 * LIMIT) if tests_all else (mutation.tests.split(), LIMIT)
        code, failed = run_tests(copy, tests, limit, "-x", *marked(mutation.slow and not tests_all))
    outcome, test, reason = judged(code, failed)
    return Result(mutation, outcome, time.monotonic() - start, test, reason)


@contextlib.contextmanager
def mutated(copy: Path, mutation: Mutation) -> Iterator[str | None]:
    """The copy with the mutation in it; yields why it cannot be built, or None. Slow tests of csrc/cpu compile it."""
    file, native = copy / mutation.file, mutation.file.startswith("csrc/cpu/") and not mutation.slow
    before = file.read_bytes()
    file.write_text(before.decode().replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        yield build_cpu(copy) if native else None
    finally:
        file.write_bytes(before)
        if native:
            copy_libraries(copy)
        shutil.rmtree(copy.parent / "cache", ignore_errors=True)


def build_cpu(copy: Path) -> str | None:
    """The C++ operators of the copy; only what changed is compiled again. csrc/cuda is built by its tests."""
    without_cuda = {**environment(copy), "MINIMIND_CUDA": "0"}
    build = [sys.executable, "minimind/ops/native_build.py"]
    subprocess.run(build, cwd=copy, env=without_cuda, capture_output=True, check=True)
    report = json.loads((copy / "minimind/_native_build.json").read_text(encoding="utf-8"))
    return report["cpu"]["missing"]


def run_tests(
    copy: Path, tests: Sequence[str], limit: float, *flags: str
) -> tuple[int | None, list[tuple[str, str, str]]]:
    """(pytest's exit status, None where the time was up; "failure" or "error", test and first line of each)."""
    report = copy.parent / "report.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *flags, *tests]
    process = subprocess.Popen(
        command,
        cwd=copy,
        env=environment(copy),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # what the tests started as well
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return code, failures(report) if report.exists() else []


def failures(report: Path) -> list[tuple[str, str, str]]:
    """What went wrong; where every test was skipped, the first of them."""
    found, skipped = [], []
    cases = list(ElementTree.parse(report).iter("testcase"))
    for case in cases:
        for kind in ("failure", "error", "skipped"):
            for problem in case.findall(kind):
                reason = problem.get("message", "").partition("\n")[0]
                row = (kind, f"{case.get('classname')}::{case.get('name')}", reason[:160])
                (skipped if kind == "skipped" else found).append(row)
    return found or (skipped[:1] if len(skipped) == len(cases) else [])


def judged(code: int | None, failed: Sequence[tuple[str, str, str]]) -> tuple[str, str, str]:
    """(outcome, test, reason). An error is a test that could not even start."""
    if code is None:
        return "NOT CAUGHT (the tests did not end)", "", ""
    kind, test, reason = failed[0] if failed else ("", "", "")
    if code == 0:
        return "not tried (the tests were skipped)" if kind == "skipped" else "NOT CAUGHT", test, reason
    if kind != "failure" or any(stumble in reason for stumble in STUMBLES):
        return f"broken mutation (pytest ended with {code})", test, reason
    return "caught", test, reason


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


if __name__ == "__main__":
    sys.exit(main())
