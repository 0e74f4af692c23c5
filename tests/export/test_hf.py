"""Folders for transformers: its classes compute the same, and its files open here again."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bench.decoding.judge import Judge
from minimind import ModelConfig, load_model, load_tokenizer, ops, rope
from minimind.config import PRESETS
from minimind.export.hf import export_hf, hf_config
from minimind.inference.generate import generate
from minimind.modeling import Model
from minimind.tokenization import Tokenizer
from minimind.tokenization.tokenizer import CONFIG_FILE
from minimind.training.arguments import StageArgs
from minimind.training.initial_model import InitialModel
from tests.export.small import CONFIGS, EXPERTS, model_of
from tests.test_golden import CASES, load_case

transformers = pytest.importorskip("transformers", reason="install minimind[export]: needs transformers")

CLASSES = {"llama": "Llama", "qwen3": "Qwen3", "qwen3moe": "Qwen3Moe", "granitemoe": "GraniteMoeShared"}
GOLDEN_CHAT = Path(__file__).parents[1] / "tokenization" / "golden_chat.json"
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def opened(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@torch.no_grad()
def check_logits(model: Model, theirs, ids: torch.Tensor, monkeypatch) -> None:
    """Theirs may be off by twice what this project's plain float32 is off by, against float64. transformers forms the
    rotated angles in another order, so an angle may be off by one more rounding on both sides."""
    found = theirs(ids).logits
    mode = ops.get_mode()
    ops.set_mode("reference")
    try:
        own = model(ids).logits
        double = copy.deepcopy(model).double()
        truth = double(ids).logits
        plain = rope.inverse_frequencies
        monkeypatch.setattr(rope, "inverse_frequencies", lambda *a: plain(*a) * (1 + EPS))
        angles = (double(ids).logits - truth).abs().max()
        monkeypatch.undo()
    finally:
        ops.set_mode(mode)
    error = (found - truth).abs().max()
    bound = 2 * ((own - truth).abs().max() + angles) + EPS * truth.abs().max()
    assert error <= bound < 1e-3 * truth.abs().max(), (error, bound)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_logits_and_greedy_tokens(name, tmp_path, monkeypatch):
    model = model_of(CONFIGS[name])
    export_hf(model, load_tokenizer(), tmp_path)
    theirs = opened(tmp_path)
    assert type(theirs).__name__ == f"{CLASSES[name.split(',')[0]]}ForCausalLM" and theirs.dtype == torch.float32
    ids = torch.randint(16, 6400, (2, 200), generator=torch.Generator().manual_seed(1))
    check_logits(model, theirs, ids, monkeypatch)

    prompts = ids[:, :100]
    theirs.generation_config.eos_token_id = None
    written = theirs.generate(prompts, do_sample=False, max_new_tokens=48)[:, 100:].tolist()
    verdict = Judge(model).judge(prompts, written, "fp32")
    assert verdict.passed and verdict.equal > 0.99
    assert written == generate(model, prompts.tolist(), 48, temperature=0.0)


@pytest.mark.parametrize("case", CASES)
def test_upstreams_own_models(case, tmp_path, monkeypatch):
    (tmp_path / "hf").mkdir()
    _, tensors, model = load_case(case, tmp_path)
    export_hf(model, load_tokenizer(), tmp_path / "hf")
    check_logits(model, opened(tmp_path / "hf"), tensors["input_ids"].long(), monkeypatch)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_opens_here_again(name, tmp_path):
    model = model_of(CONFIGS[name])
    export_hf(model, load_tokenizer(), tmp_path / "ours")
    opened(tmp_path / "ours").save_pretrained(tmp_path / "theirs")  # what a user's own training leaves
    load_tokenizer().save(tmp_path / "theirs")
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        back = load_model(folder)
        stretched = model.config
        if stretched.rope_scaling is not None:
            stretched = dataclasses.replace(stretched, max_position_embeddings=256)
        assert back.config == stretched
        state = back.state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
        origin = InitialModel.from_args(StageArgs(from_=str(folder)), None)  # type: ignore[arg-type]
        assert origin.config == stretched and origin.tokenizer.fingerprint == load_tokenizer().fingerprint


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_keep_their_name(preset):
    raw = hf_config(PRESETS[preset], load_tokenizer(), torch.float32)
    assert ModelConfig.from_dict(json.loads(json.dumps(raw))) == PRESETS[preset]
    assert "auto_map" not in raw


def test_dtype(tmp_path):
    model = model_of(CONFIGS["granitemoe"])
    export_hf(model, load_tokenizer(), tmp_path, torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert opened(tmp_path, dtype="auto").dtype == torch.bfloat16
    back = load_model(tmp_path).state_dict()
    assert all(torch.equal(back[k], t.bfloat16().float()) for k, t in model.state_dict().items())


def folder_with_template(folder: Path, template: str | None) -> Tokenizer:
    load_tokenizer().save(folder)
    if template is not None:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        (folder / CONFIG_FILE).write_text(json.dumps({**config, "chat_template": template}), encoding="utf-8")
    return load_tokenizer(folder)


@pytest.mark.parametrize("name", [None, "minimind2", "minimind3"])
def test_conversations_render_alike(name, tmp_path):
    """The shipped template as this project renders it, upstream's as upstream did."""
    golden = json.loads(GOLDEN_CHAT.read_text(encoding="utf-8"))
    tokenizer = folder_with_template(tmp_path / "t", golden[name]["template"] if name else None)
    export_hf(model_of(CONFIGS["llama"]), tokenizer, tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    rendered = 0
    for conversation, messages in golden["convs"].items():
        for tools in (False, True):
            for prompt in (False, True):
                options = {"tools": golden["tools"] if tools else None, "add_generation_prompt": prompt}
                wanted = tokenizer.apply_chat_template(messages, **options)
                if name is not None:
                    key = f"{conversation}|gen={prompt}|tools={tools}"
                    wanted = golden[name]["render"].get(key, wanted)
                assert theirs.apply_chat_template(messages, tokenize=False, **options) == wanted
                encoded = theirs.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
                assert encoded["input_ids"] == tokenizer.encode(wanted)
                rendered += 1
    assert rendered == 4 * len(golden["convs"])
    thinking = {"add_generation_prompt": True, "enable_thinking": False, "open_thinking": False}
    question = golden["convs"]["single"]
    assert theirs.apply_chat_template(question, tokenize=False, **thinking) == tokenizer.apply_chat_template(
        question, **thinking
    )


@pytest.mark.parametrize("name", [None, "minimind2", "minimind3"])
def test_answers_are_taken_apart(name, tmp_path):
    """transformers, and by the same rules vLLM's parser `hf`, finds the thought, calls and text of an answer."""
    golden = json.loads(GOLDEN_CHAT.read_text(encoding="utf-8"))
    tokenizer = folder_with_template(tmp_path / "t", golden[name]["template"] if name else None)
    export_hf(model_of(CONFIGS["llama"]), tokenizer, tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    if not hasattr(theirs, "response_template"):
        pytest.skip("transformers without response templates: pip install -U transformers")
    asked = [{"role": "user", "content": "?"}]
    call = {"name": "w", "arguments": {"c": 1}}
    calls = "".join(f"\n<tool_call>\n{json.dumps(call)}\n</tool_call>" for _ in range(2))
    parsed = [{"type": "function", "function": call}] * 2
    for opened in (None, True, False):
        variables = {} if opened is None else {"enable_thinking": opened, "open_thinking": opened}
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, **variables)
        thinks = prompt.endswith("<think>\n")
        for text, wanted in (
            ("A\n</think>\n\nB", {"thinking": "A", "content": "B"}),
            (f"A\n\nb\n</think>\n\nB{calls}", {"thinking": "A\n\nb", "content": "B", "tool_calls": parsed}),
            ("B", {"thinking": "B"} if thinks else {"content": "B"}),
        ):
            written = text if thinks or "</think>" not in text else f"<think>\n{text}"
            found = theirs.parse_response(f"{written}<|im_end|>", prefix=prompt)
            assert found == {"role": "assistant", **wanted}
    broken = theirs.parse_response("<tool_call>\n{oh\n</tool_call><|im_end|>", prefix="")
    assert broken["tool_calls"] == [{"type": "function", "function": "{oh"}]


def test_texts_get_the_same_ids(tmp_path):
    tokenizer = load_tokenizer()
    export_hf(model_of(CONFIGS["qwen3"]), tokenizer, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (
        "Hello, world's 12345!",
        "床前明月光。\n\n  two  spaces",
        "🙂 \t\r\nI'LL",
        "<think>\n</think><|im_end|>",
    ):
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text
    ids = theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id
    assert ids == (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_pipeline_answers_a_conversation(tmp_path):
    export_hf(model_of(CONFIGS["granitemoe"]), load_tokenizer(), tmp_path)
    pipe = transformers.pipeline("text-generation", model=str(tmp_path), device="cpu")
    settings = pipe.model.generation_config
    assert (settings.eos_token_id, settings.pad_token_id, settings.temperature) == (2, 0, 0.8)
    (answer,) = pipe([{"role": "user", "content": "hi"}], max_new_tokens=4)
    assert [m["role"] for m in answer["generated_text"]] == ["user", "assistant"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"qk_norm": True, "num_shared_experts": 1}, "QK-norm and plain shared experts"),
        ({"norm_topk_prob": False}, "norm_topk_prob is false here"),
    ],
)
def test_models_that_transformers_lacks(changes, message, tmp_path):
    model = model_of(ModelConfig(**{**EXPERTS, **changes}))
    with pytest.raises(ValueError, match=message):
        export_hf(model, load_tokenizer(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_top_1_without_normalised_gates_is_qwen3_moe(tmp_path, monkeypatch):
    model = model_of(ModelConfig(**EXPERTS, qk_norm=True, norm_topk_prob=False))
    export_hf(model, load_tokenizer(), tmp_path)
    assert load_model(tmp_path).config == dataclasses.replace(model.config, router_aux_loss_level="sequence")
    ids = torch.randint(16, 6400, (2, 50), generator=torch.Generator().manual_seed(1))
    check_logits(model, opened(tmp_path), ids, monkeypatch)


def test_other_peoples_files():
    """Granite's multipliers, and the defaults of its class."""
    raw = hf_config(CONFIGS["granitemoe"], load_tokenizer(), torch.float32)
    for key in ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier"):
        with pytest.raises(ValueError, match=f"granitemoeshared: {key}=3.0 is not supported"):
            ModelConfig.from_dict({**raw, key: 3.0})
    del raw["num_shared_experts"], raw["tie_word_embeddings"]
    config = ModelConfig.from_dict(raw)
    assert config.num_shared_experts == 1 and not config.tie_word_embeddings
    assert ModelConfig.from_dict({**raw, "shared_intermediate_size": 0}).num_shared_experts == 0
    raw = hf_config(CONFIGS["qwen3moe"], load_tokenizer(), torch.float32)
    del raw["norm_topk_prob"], raw["num_experts"]
    config = ModelConfig.from_dict({**raw, "num_local_experts": 4})  # the name transformers 5 has for it inside
    assert config.num_experts == 4 and not config.norm_topk_prob
    with pytest.raises(ValueError, match="use_sliding_window"):
        ModelConfig.from_dict(
            {**hf_config(CONFIGS["qwen3"], load_tokenizer(), torch.float32), "use_sliding_window": True}
        )
