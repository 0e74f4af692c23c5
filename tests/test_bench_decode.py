"""bench/decode.py on a CPU and a tiny model: which decoders pass, what is counted, written and refused."""

import csv
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from bench import decode_attention
from bench.common.models import random_model
from bench.common.record import columns_of
from bench.common.timing import read_bandwidth
from bench.common.worker import ImplementationError
from bench.decode import Args, bytes_per_weight, main, step_bytes, summary
from bench.decoding import implementations
from bench.decoding.implementations import IMPLEMENTATIONS, DecodeSetting, Generation, naive, naive_forward, why_not
from bench.decoding.judge import Judge, round_q8, rounded_logits
from bench.decoding.report import DecodeRow, plot, show
from bench.decoding.vllm_peer import VARIABLE, version
from minimind import ModelConfig, ops
from minimind.inference.decode.kv_cache import FLOAT8
from minimind.modeling import Model
from minimind.ops import native
from minimind.rope import rope_cos_sin
from minimind.weights import save_weights
from tests.inference.decode.cases import needs_native
from tests.inference.small import VARIANTS

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SMALL = ModelConfig(32, 2, 4, 2, 16, 64, 200)


def greedy(model: Model, prompts: torch.Tensor, new: int) -> list[list[int]]:
    ids = prompts
    with torch.no_grad():
        for _ in range(new):
            ids = torch.cat((ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    return ids[:, prompts.shape[1] :].tolist()


def prompts_of(rows: int, length: int, vocab: int = 200) -> torch.Tensor:
    return torch.randint(16, vocab, (rows, length), generator=torch.Generator().manual_seed(0))


def test_the_judge_lets_the_greedy_continuation_through_and_nothing_else():
    model, prompts = random_model(SMALL), prompts_of(3, 9)
    judge, tokens = Judge(model), greedy(random_model(SMALL), prompts_of(3, 9), 20)
    verdict = judge.judge(prompts, tokens, "fp32")
    assert verdict.passed and verdict.equal == 1 and verdict.error < 1e-5
    assert len({t for row in tokens for t in row}) >= 8, "a model that repeats itself proves nothing"
    for row in range(3):
        wrong = [list(r) for r in tokens]
        wrong[row][-1] = (wrong[row][-1] + 1) % 200
        assert not judge.judge(prompts, wrong, "fp32").passed
        assert not judge.judge(prompts, wrong, "bf16").passed
    with pytest.raises(ValueError, match="3 prompts got 2 rows"):
        judge.judge(prompts, tokens[:2], "fp32")
    with pytest.raises(ValueError, match=r"rows of \[19, 20\] tokens"):
        judge.judge(prompts, [tokens[0][:-1], *tokens[1:]], "fp32")


@pytest.mark.parametrize("width, dtype", [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_the_judge_allows_a_narrow_decoder_its_rounding_and_no_more(width, dtype):
    import copy

    model, prompts = random_model(SMALL), prompts_of(4, 9)
    narrow = greedy(copy.deepcopy(model).to(dtype), prompts, 40)
    verdict = Judge(model).judge(prompts, narrow, width)
    assert verdict.passed and verdict.error > 1e-4
    stale = greedy(random_model(SMALL, seed=1), prompts, 40)
    assert not Judge(model).judge(prompts, stale, width).passed


def test_the_judge_allows_a_float8_cache_its_rounding(tmp_path):
    model, prompts = random_model(SMALL), prompts_of(4, 9)
    save_weights(model, tmp_path)
    decode = implementations.ours(DecodeSetting(tmp_path, 4, 9, 40, 1, CPU), torch.float32, "reference", FLOAT8)
    judge, tokens = Judge(model), decode(prompts).tokens
    verdict = judge.judge(prompts, tokens, "fp32", float8_cache=True)
    assert verdict.passed and verdict.error > 1e-3
    assert not judge.judge(prompts, tokens, "fp32").passed, "the cache was not rounded at all"
    stale = greedy(random_model(SMALL, seed=1), prompts, 40)
    assert not judge.judge(prompts, stale, "fp32", float8_cache=True).passed
    assert [name for name, peer in IMPLEMENTATIONS.items() if peer.kv_bytes == 1] == ["ours-fp8"]


@needs_native
def test_the_judge_allows_8_bit_weights_their_rounding(tmp_path):
    model, prompts = random_model(SMALL), prompts_of(4, 9)
    save_weights(model, tmp_path)
    with torch.inference_mode():
        decode = IMPLEMENTATIONS["ours-int8"].make(DecodeSetting(tmp_path, 4, 9, 40, 1, CPU))
        judge, tokens = Judge(model), decode(prompts).tokens
    verdict = judge.judge(prompts, tokens, "int8")
    assert verdict.passed and verdict.error > 1e-3
    assert not judge.judge(prompts, greedy(random_model(SMALL, seed=1), prompts, 40), "int8").passed


@pytest.mark.parametrize(
    "device, batch, variant, expected",
    [("cpu", 64, "moe", 1), ("cuda", 8, "dense", 1), ("cuda", 9, "dense", 2), ("cuda", 1, "moe", 2)],
)
def test_bytes_of_a_weight_of_8_bits(tmp_path, device, batch, variant, expected):
    model = random_model(ModelConfig(32, 2, 4, 2, 16, 64, 200, **VARIANTS[variant]))
    setting = DecodeSetting(tmp_path, batch, 9, 40, 1, torch.device(device))
    assert bytes_per_weight("int8", model, setting) == expected
    assert bytes_per_weight("fp32", model, setting) == 4


def test_q8_rounding_equals_the_file_formats():
    gguf = pytest.importorskip("gguf", reason="install minimind[export]: needs gguf")
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    x[0] = 0
    kind = gguf.GGMLQuantizationType.Q8_0
    theirs = gguf.quants.dequantize(gguf.quants.quantize(x.numpy(), kind), kind)
    assert np.array_equal(round_q8(x).numpy(), theirs)
    model = random_model(SMALL)
    before = model.embed_tokens.weight.clone()
    with torch.no_grad():
        found, plain = rounded_logits(model, prompts_of(1, 5), "q8_0"), model(prompts_of(1, 5)).logits
    assert torch.equal(model.embed_tokens.weight, before), "the model itself is left alone"
    assert 1e-4 < (found - plain).abs().max() < 0.5


@pytest.mark.parametrize("variant", ["dense", "qk_norm, untied", "moe", "moe top-1, qk_norm"])
def test_the_naive_loop_computes_the_model(variant):
    model = random_model(ModelConfig(32, 2, 4, 2, 16, 64, 200, **VARIANTS[variant])).double()
    ids = prompts_of(2, 12)
    past: list = [None, None]
    with torch.no_grad():
        whole = model(ids).logits
        ops.set_mode("reference")
        table = rope_cos_sin(model.config, torch.arange(12))
        parts = [naive_forward(model, part, past, table) for part in (ids[:, :7], ids[:, 7:8], ids[:, 8:9])]
    assert torch.allclose(torch.cat(parts, dim=1), whole[:, :9], rtol=0, atol=1e-6), "cos and sin are float32"
    assert past[0][0].shape[1] == 9


def test_the_naive_decoder_is_greedy(tmp_path):
    model, prompts = random_model(SMALL), prompts_of(3, 9)
    save_weights(model, tmp_path)
    with torch.inference_mode():
        generation = naive(DecodeSetting(tmp_path, 3, 9, 15, 1, CPU))(prompts)
    assert generation.tokens == greedy(model, prompts, 15)
    assert [count for _, count in generation.stamps] == [3] * 15
    assert generation.first == [generation.stamps[0][0]] * 3


@pytest.mark.parametrize("max_context", [None, 200])
def test_the_engine_is_driven_to_the_end_of_every_row(tmp_path, max_context):
    model, prompts = random_model(SMALL), prompts_of(5, 9)
    save_weights(model, tmp_path)
    decode = implementations.ours(DecodeSetting(tmp_path, 5, 9, 15, 1, CPU, max_context), torch.float32, "reference")
    for _ in range(2):
        generation = decode(prompts)
        assert generation.tokens == greedy(model, prompts, 15)
        assert sum(count for _, count in generation.stamps) == 5 * 15 and len(generation.first) == 5


def test_the_summary_of_steps():
    setting = DecodeSetting(Path(), 2, 8, 4, 1, CPU)
    # the second row joins at 3 s; the first ends a step before it: two whole steps, of 1 and 3 s
    turn = Generation([[1] * 4, [1] * 4], [(1.0, 1), (3.0, 2), (4.0, 2), (7.0, 2), (8.0, 1)], [1.0, 3.0])
    found = summary([turn, turn], setting)
    assert found["ttft"] == 2.0 and found["tpot"] == 2.0 and found["tokens_per_second"] == 1.0
    assert found["overall_per_second"] == 2 * 8 / 16 and found["turns"] == 2
    apart = Generation([[1] * 2] * 2, [(1.0, 1), (2.0, 1), (3.0, 1), (4.0, 1)], [1.0, 3.0])
    with pytest.raises(ValueError, match="no step gave all 2 rows a token"):
        summary([apart], setting)


def test_bytes_of_a_step():
    config = ModelConfig.preset("minimind2-moe")
    with torch.device("meta"):
        model, dense = Model(config), Model(ModelConfig.preset("minimind2-small"))
    one, four = (DecodeSetting(Path(), batch, 100, 56, 1, CPU) for batch in (1, 4))
    assert step_bytes(model, one, 2.0, 0) == 2 * model.num_parameters(active=True)
    assert step_bytes(model, four, 2.0, 0) == 2 * model.num_parameters()
    kv = dense.kv_bytes_per_token(torch.bfloat16)
    assert kv == 2 * 8 * 2 * 64 * 2
    assert step_bytes(dense, four, 2.0, kv) == 2 * dense.num_parameters() + 4 * 128 * kv


def test_bandwidth_is_positive_and_finite():
    assert 1e7 < read_bandwidth(1 << 20, CPU, 0.05) < 1e13


def row(**changes) -> DecodeRow:
    values = dict.fromkeys(columns_of(DecodeRow)) | {
        "device": "card", "threads": 2, "model": "m", "weights": "random weights", "peer": "ours", "width": "bf16",
        "batch": 1, "prompt": 8, "new": 8, "status": "ok", "reason": "", "ttft": 0.01, "tpot": 0.001, "p20": 0.0009,
        "p80": 0.0012, "tokens_per_second": 1000.0, "share": 0.5, "kv_bytes_per_token": 4096, "error_ratio": 0.5,
    }  # fmt: skip
    return DecodeRow(**(values | changes))


def test_table_and_picture(tmp_path):
    console = Console(record=True, width=160)
    refused = row(peer="broken", status="refused", reason="error ratio 9", tokens_per_second=None, tpot=None)
    rows = [row(), refused, row(peer="naive", tokens_per_second=200.0)]
    show(rows, console)
    text = console.export_text()
    assert "5.00" in text and "broken refused: error ratio 9" in text and "ratios against naive" in text
    plot([*rows, row(batch=16)], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    plot([refused], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(
    "given, message",
    [
        ({"peer": ("theirs",)}, "--peer theirs: unknown; choose from ours, "),
        ({"preset": "gpt5"}, "--preset gpt5: unknown"),
        ({"batch": (0,)}, "--batch 0: must be at least 1"),
        ({"prompt": 0}, "--prompt 0: must be at least 1"),
        ({"turns": 0}, "--turns 0: must be at least 1"),
        ({"busy": -1}, "--busy -1: must be at least 0"),
        ({"new": 1}, "--new 1: must be at least 2"),
        ({"max_context": 255}, "--max-context 255: --prompt and --new need 256"),
        ({"device": "abacus"}, "--device abacus"),
    ],
)
def test_bad_arguments(given, message):
    with pytest.raises(ValueError, match=message):
        main(Args(**given))


def test_an_implementation_that_cannot_run_has_a_reason():
    moe = ModelConfig.preset("minimind2-moe")
    assert "dense models only" in (why_not("hf-dynamic", moe, CPU) or "")
    assert why_not("naive", moe, CPU) is None and why_not("ours-reference", moe, CPU) is None
    assert why_not("ours", moe, CPU) == why_not("ours-fp8", moe, CPU) == native.why_not(CPU)
    assert why_not("llama.cpp-f16", moe, torch.device("cuda")) in (
        "built for the CPU only",
        "llama-cpp-python is not installed",
    )


FAKE_VLLM = """#!{python}
import json, sys
if sys.argv[2].endswith("broken/hf"):
    print("no model\\nKeyError: 'vocab'", file=sys.stderr)
    sys.exit(1)
print('"ready"', flush=True)
for line in sys.stdin:
    rows = json.loads(line)
    tokens = [[row[-1] + int(n) for n in range(int(sys.argv[6]))] for row in rows]
    print(json.dumps({{"tokens": tokens, "stamps": [[0.5, len(rows)]], "first": [0.5] * len(rows)}}), flush=True)
"""


def test_vllm_runs_in_a_python_of_its_own(tmp_path, monkeypatch):
    """Without it: a program stands in that speaks the same lines."""
    monkeypatch.delenv(VARIABLE, raising=False)
    assert why_not("vllm", SMALL, CPU) == "MINIMIND_BENCH_VLLM names no Python that has it" and version() is None
    program = tmp_path / "python"
    program.write_text(FAKE_VLLM.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv(VARIABLE, str(program))
    assert why_not("vllm", SMALL, CPU) is None and why_not("vllm", SMALL, torch.device("cuda")) is not None
    decode = implementations.Vllm(DecodeSetting(tmp_path, 2, 3, 2, 1, CPU))
    for _ in range(2):
        found = decode(torch.tensor([[1, 2, 3], [4, 5, 6]]))
        assert found == Generation([[3, 4], [6, 7]], [(0.5, 2)], [0.5, 0.5])
    assert (decode.process.peak_mib() or 1) > 0
    with pytest.raises(ValueError, match=r"^vLLM: KeyError: 'vocab'$"):
        implementations.Vllm(DecodeSetting(tmp_path / "broken", 2, 3, 2, 1, CPU))


def test_every_peer_is_described():
    text = inspect.cleandoc(implementations.__doc__ or "")
    for name in IMPLEMENTATIONS:
        assert re.search(rf"(?m)(^|[\s,]){re.escape(name)}([\s,]|$)", text), name


@pytest.mark.heavy
def test_a_run_of_the_script(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "bench/decode.py", "--preset", "nano", "--peer", "ours-reference", "naive",
               "--batch", "1", "3", "--prompt", "9", "--new", "6", "--turns", "1", "--busy", "1", "--out",
               str(tmp_path)]  # fmt: skip
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr[-3000:]
    result = json.loads(answer.stdout.splitlines()[-1])
    rows = result["rows"]
    assert [(r["peer"], r["batch"]) for r in rows] == [
        (peer, batch) for batch in (1, 3) for peer in ("ours-reference", "naive")
    ]
    assert {r["model"] for r in rows} == {"nano, 9 + 6 tokens, beside 1 busy"}
    for r in rows:
        assert r["status"] == "ok" and r["error_ratio"] <= 2 and r["peak_mib"] > 50 and r["threads"] == 1
        assert r["tokens_per_second"] == pytest.approx(r["batch"] / r["tpot"]) and r["ttft"] > 0
        assert r["share"] == pytest.approx(r["step_bytes"] / r["bandwidth"] / r["tpot"])
    assert [r["equal"] for r in rows if r["peer"] == "naive"] == [1.0, 1.0]
    with (tmp_path / "decode.csv").open(encoding="utf-8", newline="") as file:
        assert [r["peer"] for r in csv.DictReader(file)] == ["ours-reference", "naive"] * 2
    assert Path(result["png"]).read_bytes().startswith(b"\x89PNG")


@pytest.mark.heavy
def test_a_decoder_that_writes_nonsense_is_refused(tmp_path, monkeypatch):
    """In this process, with workers replaced: only a decoder that passes the check is timed."""
    from bench import decode

    class FakeWorker:
        def __init__(self, start, name: str, setting: DecodeSetting) -> None:
            self.name, self.setting = name, setting

        def wait_until_ready(self) -> None:
            if self.name == "hf-dynamic":
                raise ImplementationError("out of memory")

        def ask(self, prompts: list[list[int]] | None) -> Generation | float:
            if prompts is None:
                return 1.0
            tokens = greedy(random_model(ModelConfig.preset("nano")), torch.tensor(prompts), self.setting.new)
            if self.name == "ours-reference":
                tokens[-1][-1] = 17
            stamps = [(0.5 + i, len(tokens)) for i in range(self.setting.new)]
            return Generation(tokens, stamps, [0.5] * len(tokens))

        def close(self) -> None:
            pass

    monkeypatch.setattr(decode, "Worker", FakeWorker)
    args = Args(preset="nano", peer=("ours-reference", "hf-dynamic", "naive"), batch=(2,), prompt=5, new=4, turns=2,
                device="cpu", out=str(tmp_path))  # fmt: skip
    monkeypatch.setattr(decode, "why_not", lambda *_: None)
    nonsense, dead, good = main(args)["rows"]
    assert nonsense["status"] == "refused" and nonsense["tpot"] is None and nonsense["error_ratio"] > 2
    assert dead["status"] == "failed" and dead["reason"] == "out of memory"
    assert good["status"] == "ok" and good["tpot"] == 1.0 and good["turns"] == 2


def test_attention_implementations_agree(tmp_path):
    case = decode_attention.make_case(ModelConfig.preset("minimind2-small"), 3, 37, CPU, torch.float32)
    assert case.table.unique().numel() == case.table.numel() == 3 * 3
    truth = decode_attention.eager(case.to(torch.float64), 0)
    found = decode_attention.ours(case, 0)
    assert (found - truth).abs().max() <= 2 * (decode_attention.eager(case, 0) - truth).abs().max() + 1e-6
    assert decode_attention.error_ratio("eager", case) <= 1
    assert case.bytes_read == 2 * 3 * 37 * 2 * 64 * 4
    result = decode_attention.main(
        decode_attention.Args(preset=("nano",), batch=(2,), context=(20,), repeat=2, device="cpu", out=str(tmp_path))
    )
    rows = {r["contender"]: r for r in result["rows"]}
    assert rows["eager"]["status"] == rows["dense"]["status"] == "ok" and rows["eager"]["rate"] > 0
    assert ("minimind" in rows) == (native.why_not(CPU) is None)
