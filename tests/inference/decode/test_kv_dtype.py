"""A cache of another dtype than the model's, float8 above all: the engine against whole forwards that round keys and
values the same way (`rounded_cache`), and the bound that float8's scales stand on."""

import copy
import json
import re
from itertools import pairwise

import pytest
import torch

from minimind import cli
from minimind.apps import chat
from minimind.config import YarnScaling
from minimind.inference.decode.kv_cache import (
    FLOAT8,
    FLOAT8_MAX,
    check_kv_dtype,
    float8_scales,
    key_value_bounds,
    restored,
    rounded_cache,
    stored,
)
from minimind.inference.requests import Request, SamplingParams
from minimind.inference.scheduler import Chunk
from minimind.lora import LoRAConfig, add_adapter
from minimind.modeling import Rotation
from minimind.rope import rope_cos_sin
from tests.inference.small import VARIANTS, is_greedy, random_prompts, small_model
from tests.inference.test_engine import BACKENDS, engine_of, greedily, new_ids
from tests.inference.test_prefill import TOKENS, runner_of, sequence_of
from tests.kernels.contract import move_by_rounding

DTYPES = [FLOAT8, torch.bfloat16, torch.float16]


def log_probs(model, prompt, new, dtype=None):
    """Log-probabilities of `new` by one whole forward, with keys and values rounded to `dtype`: float64 [len(new)]."""
    ids = torch.tensor([prompt + new])
    with torch.no_grad():
        if dtype is None:
            logits = model(ids).logits
        else:
            with rounded_cache(model, dtype):
                logits = model(ids).logits
    logits = logits[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(new)[:, None])[:, 0]


@torch.no_grad()
def effect_of_rounding(model, prompts, outputs, dtype):
    """The largest change of a log-probability behind a rounded cache by the rounding of float32 sums before it."""
    exact = copy.deepcopy(model).double()
    moved = copy.deepcopy(exact)
    move_by_rounding(moved, terms=48)
    both = [[log_probs(m, p, new, dtype) for p, new in zip(prompts, outputs, strict=True)] for m in (exact, moved)]
    return float((torch.cat(both[0]) - torch.cat(both[1])).abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("variant", "dtype"), [(v, d) for i, v in enumerate(VARIANTS) for d in (DTYPES if i == 0 else DTYPES[:1])]
)
def test_the_engine_computes_what_whole_forwards_with_a_rounded_cache_do(variant, backend, dtype):
    model = small_model(variant)
    prompts = random_prompts(8, 60, model.config.vocab_size)
    engine = engine_of(model, backend=backend, prefill_chunk=32, kv_dtype=dtype)
    outputs = engine.generate(greedily(prompts))
    together = new_ids(outputs)
    error = effect = 0.0
    for prompt, output in zip(prompts, outputs, strict=True):
        rounded = log_probs(model, prompt, output.token_ids, dtype)
        error = max(error, float((torch.tensor(output.log_probs) - rounded).abs().max()))
        effect = max(effect, float((log_probs(model, prompt, output.token_ids) - rounded).abs().max()))
    # now and then a number of the cache is rounded to the other side, as sums in another order do it
    assert error < effect / 8 or error < 2 * effect_of_rounding(model, prompts, together, dtype)
    with rounded_cache(model, dtype):
        assert all(is_greedy(model, p, ids) for p, ids in zip(prompts, together, strict=True))
    alone = engine_of(model, backend=backend, max_batch=1, prefix_cache=False, kv_dtype=dtype)
    assert new_ids(alone.generate(greedily(prompts))) == together


@pytest.mark.parametrize("kv_dtype", [FLOAT8, torch.float32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_in_bfloat16(backend, kv_dtype):
    """The error against float64 with the same cache is at most that of the model's own bfloat16 forward."""
    model = small_model("qk_norm, untied").bfloat16().float()
    prompts = random_prompts(8, 60, model.config.vocab_size)
    engine = engine_of(model, dtype=torch.bfloat16, kv_dtype=kv_dtype, backend=backend)
    outputs = engine.generate(greedily(prompts))
    mine, own = [], []
    for prompt, output in zip(prompts, outputs, strict=True):
        model.double().compute_dtype = None
        truth = log_probs(model, prompt, output.token_ids, kv_dtype)
        model.float().compute_dtype = torch.bfloat16
        mine.append(torch.tensor(output.log_probs) - truth)
        own.append(log_probs(model, prompt, output.token_ids, kv_dtype) - truth)
    mine_error, own_error = (torch.cat(errors).pow(2).mean().sqrt() for errors in (mine, own))
    assert mine_error <= 2 * own_error


def test_chunking_a_prompt_does_not_change_the_result():
    model = small_model("moe", vocab_size=50)
    ids, pages = TOKENS[0][:30], [9, 3, 20, 5, 0, 1, 2, 4]

    def logits(bounds, dtype):
        runner, _ = runner_of(model, kv_dtype=dtype)
        s = sequence_of(ids, pages)
        chunks = [Chunk(s, start, end, end == 30) for start, end in pairwise(bounds)]
        return [runner.prefill([chunk]) for chunk in chunks][-1]

    whole, exact = logits([0, 30], FLOAT8), logits([0, 30], torch.float32)
    effect = (whole - exact).abs().max()
    for bounds in ([0, 7, 30], [0, 29, 30], [*range(0, 31, 5)]):
        assert (logits(bounds, FLOAT8) - whole).abs().max() < effect / 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_preemption_shared_pages_and_copies_of_them(backend):
    """Recomputed, reused and copied pages give the same results."""
    model = small_model()
    system = list(range(37))
    prompts = [system + tail for tail in random_prompts(5, 12, model.config.vocab_size)]
    params = SamplingParams(20, temperature=1.3, seed=3, n=2)
    requests = [Request(p, params) for p in prompts]
    tight = engine_of(model, backend=backend, kv_tokens=176, kv_dtype=FLOAT8)
    outputs = tight.generate(requests)
    assert tight.stats().preemptions > 0 and tight.stats().cached_tokens > 0
    for request, output in zip(requests, outputs, strict=True):
        (alone,) = engine_of(model, backend=backend, prefix_cache=False, kv_dtype=FLOAT8).generate([request])
        assert [c.token_ids for c in output.completions] == [c.token_ids for c in alone.completions]


@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_follow_new_weights_and_adapters(backend):
    model = small_model()
    add_adapter(model, LoRAConfig(rank=2))
    engine = engine_of(model, backend=backend, kv_dtype=FLOAT8)
    prompts = random_prompts(3, 30, model.config.vocab_size)
    engine.generate(greedily(prompts))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.normal_(std=30.0, generator=torch.Generator().manual_seed(0))  # much above 448
    engine.refresh_weights()
    fresh = engine_of(model, backend=backend, kv_dtype=FLOAT8)
    assert (fresh._cache.k_scale > 4 * float8_scales(small_model())[0]).all()
    assert new_ids(engine.generate(greedily(prompts))) == new_ids(fresh.generate(greedily(prompts)))


class Watch:
    """A layout that records its keys and values."""

    def attend(self, q, k, v):
        self.seen = k, v
        return q


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("yarn", [None, YarnScaling(8.0, 64, attention_factor=None)])
@torch.no_grad()
def test_key_value_bounds_hold_and_are_reached(qk_norm, yarn):
    """The bounds of a layer with a single pair of a key, for inputs that maximise it."""
    model = small_model(qk_norm=qk_norm, rope_scaling=yarn)
    layer = model.layers[1]
    attention, generator = layer.self_attn, torch.Generator().manual_seed(0)
    layer.input_layernorm.weight.copy_(torch.randn(32, generator=generator))
    keys = attention.qkv_proj.weight[4 * 16 : 6 * 16].view(2, 2, 8, 32)  # [G, halves, pairs, C]
    keys[:, :, 1:] = 0
    keys[:, 1] = keys[:, 0]  # an eighth of a turn makes one number of two
    if qk_norm:
        attention.k_norm.weight.view(2, 8)[:, 0] = -3.0
    rows = attention.qkv_proj.weight * layer.input_layernorm.weight
    worst = (rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-9))[rows.norm(dim=1) > 0] * 32**0.5
    inputs = (worst * layer.input_layernorm.weight)[:, None].expand(-1, 16, -1)  # each at 16 positions
    positions = torch.arange(16)
    watch = Watch()
    attention(inputs, Rotation(*rope_cos_sin(model.config, positions), positions[None]), watch)
    bounds = key_value_bounds(layer, model.config)
    for seen, bound, scale in zip(watch.seen, bounds, float8_scales(model), strict=True):
        largest = seen.abs().amax(dim=(0, 1, 3))
        assert (largest <= bound * (1 + 1e-5)).all() and (largest >= 0.98 * bound).all()
        assert (bound <= FLOAT8_MAX * scale[1]).all() and (bound > FLOAT8_MAX / 2 * scale[1]).all()
        assert (torch.frexp(scale)[0] == 0.5).all(), "a power of two"


def test_numbers_are_rounded_as_float8():
    x = torch.tensor([[0.0, 1.0, -1.06, 1.07, 448.0, 470.0, -1e9, 2.0**-9]]) * 0.5
    scale = torch.tensor([0.5])
    found = restored(stored(x, FLOAT8, scale), torch.float32, scale) / 0.5
    assert found.tolist() == [[0.0, 1.0, -1.0, 1.125, 448.0, 448.0, -448.0, 2.0**-9]]
    assert stored(torch.tensor([[float("nan")]]), FLOAT8, scale).isnan().all()
    silent = small_model()
    with torch.no_grad():
        silent.layers[0].self_attn.qkv_proj.weight.zero_()
    assert all(s.isfinite().all() and (s > 0).all() for s in float8_scales(silent))


def test_the_budget_counts_bytes_of_the_cache():
    model = small_model()
    rooms = {}
    for dtype in (torch.float32, torch.bfloat16, FLOAT8):
        engine = engine_of(model, kv_tokens=None, kv_bytes=1 << 18, kv_dtype=dtype)
        stats = engine.stats()
        assert stats.kv_bytes == 1 << 18
        assert stats.kv_bytes_per_token == model.kv_bytes_per_token(dtype)
        assert stats.kv_dtype == str(dtype).removeprefix("torch.")
        assert f"MiB of {stats.kv_dtype} for" in engine.describe() and "float32, weights" in engine.describe()
        rooms[dtype] = stats.pages_total * stats.page_size
    assert rooms[FLOAT8] == 2 * rooms[torch.bfloat16] == 4 * rooms[torch.float32] == 2048


def test_invalid_kv_dtypes_are_one_line():
    for dtype in (torch.int8, torch.float64, torch.float8_e5m2):
        with pytest.raises(ValueError, match=re.escape(f"kv_dtype={dtype} must be one of torch.bfloat16,")):
            engine_of(small_model(), kv_dtype=dtype)
    with pytest.raises(ValueError, match="needs a CPU or a CUDA GPU, not mps: use"):
        check_kv_dtype(FLOAT8, torch.device("mps"))
    check_kv_dtype(torch.bfloat16, torch.device("mps"))


def test_the_flag_reaches_chat_serve_and_evaluate(folder, capsys):
    model = ["--model", str(folder / "m"), "--dtype", "fp32"]
    _, notes = chat.open_session(chat.Args(model=str(folder / "m"), kv_dtype="fp8"))
    assert "MiB of float8_e4m3fn for" in notes[-1]
    ppl = ["evaluate", *model, "--ppl", str(folder / "book.txt"), "--context", "64", "--tokens", "256",
           "--out", str(folder / "out")]  # fmt: skip
    found = {}
    for flags in ([], ["--kv-dtype", "fp32"], ["--kv-dtype", "fp8", "--yarn", "4"]):
        assert cli.run([*ppl, *flags]) == 0
        scores = json.loads((folder / "out" / "perplexity.json").read_text())["scores"]
        found[len(flags)] = {s["curve"]: s["perplexity"] for s in scores}
    assert list(found[0]) == list(found[2]) == ["as it is"], "the same dtype rounds nothing: one curve"
    curves = ["as it is", "YaRN, factor 4", "as it is, cache in fp8", "YaRN, factor 4, cache in fp8"]
    assert list(found[4]) == curves and len(set(found[4].values())) == 4
    assert found[4]["as it is"] == found[0]["as it is"]
    capsys.readouterr()
    assert cli.run(["evaluate", *model, "--tasks", "arc_easy", "--kv-dtype", "fp8"]) == 2
    assert "--kv-dtype fp8: --tasks scores without a cache" in capsys.readouterr().err


def test_the_server_keeps_its_cache_in_float8(folder):
    for package in ("fastapi", "llguidance", "prometheus_client"):
        pytest.importorskip(package, reason="install minimind[serve]")
    from minimind.serving.command import Args, open_service

    _, notes = open_service(Args(model=str(folder / "m"), kv_dtype="fp8", kv_tokens=1024))
    assert any("MiB of float8_e4m3fn for 1024 tokens" in note for note in notes)
