"""Reward models as rewards: each conversation gets the same score in any batch."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from minimind import ModelConfig, load_tokenizer
from minimind.rewards import parse_rewards
from minimind.rewards.model import ClassifierReward, batches, model_reward
from minimind.value_head import ValueModel, save_value_model
from tests.kernels.contract import assert_within
from tests.rewards.samples import sample

TINY = ModelConfig(64, 2, 4, 2, 16, 128, qk_norm=True)
CPU = torch.device("cpu")
ANSWERS = ["4", "The sum of two and two is four.", "<think>2 + 2</think>4", "", "4<|im_end|>", "four " * 60]
SAMPLES = [sample(text, prompt=[{"role": "user", "content": "2 + 2?"}]) for text in ANSWERS]
LONG = [("system", "Be brief."), ("user", "Hello."), ("assistant", "Hi!"), ("user", "Hm.")]
SAMPLES.append(sample("Hi.", prompt=[{"role": role, "content": content} for role, content in LONG]))


def save(folder: Path) -> ValueModel:
    torch.manual_seed(0)
    model = ValueModel(TINY)
    torch.nn.init.normal_(model.value_head.weight)
    save_value_model(model.eval(), folder)
    load_tokenizer().save(folder)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("reward")
    save(path)
    return path


def rendered(one) -> list[int]:
    """The conversation through the answer's last word: rendered as text, without the end of the turn."""
    tokenizer = load_tokenizer()
    text = tokenizer.apply_chat_template([*one.prompt, {"role": "assistant", "content": one.text}])
    return tokenizer.encode(text.removesuffix("<|im_end|>\n"))


def test_scores_are_values_at_the_answers_last_token(folder, tmp_path):
    """Packed, in any order, in one forward or in many."""
    model, truth = save(tmp_path / "copy"), save(tmp_path / "copy").double()
    plain = [one for one in SAMPLES if "<|im_end|>" not in one.text]
    rows = [torch.tensor([rendered(one)]) for one in plain]
    exact, alone = (torch.stack([m(row).values[0, -1] for row in rows]) for m in (truth, model))
    reward = model_reward(str(folder), CPU)
    reward.model.compute_dtype = None  # float32 on every machine
    for limit in (16384, 40, 1):
        reward.batch_tokens = limit
        scores = reward(plain)
        assert scores.dtype == np.float64
        assert_within(torch.tensor(scores, dtype=alone.dtype), alone, exact)
        assert_within(torch.tensor(reward(plain[::-1])[::-1].copy(), dtype=alone.dtype), alone, exact)
    assert len(set(np.round(scores, 6))) == len(plain)


def test_an_answer_model_sees_the_answer_alone(folder):
    """The score ignores the reasoning; a reply cut off within its reasoning has an empty answer."""
    rewards = parse_rewards([f"answer_model={folder}", f"model={folder}:0.5"])
    texts = ["<think>2 + 2</think>4", "<think>or 5?</think><answer>4</answer>", "4", "<think>2 +", ""]
    samples = [sample(text, prompt=SAMPLES[0].prompt) for text in texts]
    scores = rewards(samples)
    answers, whole = scores.parts["answer_model"], scores.parts["model"]
    assert answers[0] == pytest.approx(answers[2], rel=1e-2) and answers[1] == pytest.approx(answers[2], rel=1e-2)
    assert answers[3] == pytest.approx(answers[4], rel=1e-2) and answers[2] != pytest.approx(answers[4], rel=1e-2)
    assert len(set(np.round(whole, 6))) == len(texts) and scores.total == pytest.approx(answers + 0.5 * whole)
    first, second = (part.reward for part in rewards.parts)
    assert first.__closure__[0].cell_contents is second  # one model, loaded once
    assert rewards.bounds is None


def test_control_tokens_in_an_answer_are_text(folder):
    """An answer cannot end its own turn and continue in another role."""
    reward = model_reward(str(folder), CPU)
    ended, plain = reward([SAMPLES[4], SAMPLES[0]])
    assert ended != plain


def test_a_run_folder_is_its_newest_checkpoint(folder, tmp_path):
    for step, source in ((1, None), (2, folder)):
        target = tmp_path / "checkpoints" / f"step-{step:08d}"
        shutil.copytree(source, target) if source else target.mkdir(parents=True)
    rewards = parse_rewards([f"model={tmp_path}:2", "regex=four"])
    scores = rewards(SAMPLES)
    alone = model_reward(str(folder), CPU)(SAMPLES)
    assert scores.parts["model"].tolist() == alone.tolist()
    assert scores.total == pytest.approx(2 * alone + scores.parts["regex"])


@pytest.mark.parametrize("padded", [False, True])
def test_batches_hold_everything_once_within_their_limit(padded):
    lengths = np.random.default_rng(0).integers(1, 100, 200).tolist()
    parts = list(batches(lengths, 150, padded))
    assert sorted(np.concatenate(parts)) == list(range(200))
    for part in parts:
        mine = [lengths[i] for i in part]
        assert (len(mine) * max(mine) if padded else sum(mine)) <= 150
    assert len(parts) < 150
    assert [part.tolist() for part in batches([500, 3], 150, padded)] == [[1], [0]]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    """A classifier of transformers whose tokenizer pads with the token that ends turns."""
    transformers = pytest.importorskip("transformers", reason="install minimind[export]: needs transformers")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("classifier")
    tokenizer = load_tokenizer()
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = transformers.LlamaConfig(vocab_size=tokenizer.vocab_size, num_labels=1, **shape)
    transformers.LlamaForSequenceClassification(config).save_pretrained(path)
    tokenizer.save(path)
    fast = transformers.AutoTokenizer.from_pretrained(path)
    fast.pad_token = "<|im_end|>"
    fast.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
    fast.save_pretrained(path)
    return path


def test_a_classifier_of_transformers(classifier):
    """Padding does not change scores: each is that of the conversation's last token alone."""
    reward = model_reward(str(classifier), CPU)
    assert isinstance(reward, ClassifierReward)
    rows = [
        reward.tokenizer.apply_chat_template(
            [*one.prompt, {"role": "assistant", "content": one.text}], tokenize=True, return_dict=False
        )
        for one in SAMPLES
    ]
    assert len({len(row) for row in rows}) > 4
    assert all(row[-1] == reward.tokenizer.pad_token_id for row in rows)

    def of_last_tokens(model) -> torch.Tensor:
        hidden = [model.model(torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
        return torch.stack(hidden) @ model.score.weight[0]

    exact, alone = of_last_tokens(copy.deepcopy(reward.model).double()), of_last_tokens(reward.model)
    for limit in (16384, 300, 1):
        reward.batch_tokens = limit
        assert_within(torch.tensor(reward(SAMPLES), dtype=alone.dtype), alone, exact, f"limit {limit}")


def test_a_folder_without_a_reward_model_is_refused(classifier, tmp_path):
    transformers = pytest.importorskip("transformers", reason="install minimind[export]: needs transformers")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match=r"--reward model=.*empty: it has no config.json; name a run of train/reward.py"
    ):
        parse_rewards([f"model={tmp_path / 'empty'}"])
    config = transformers.AutoConfig.from_pretrained(classifier)
    config.num_labels = 3
    three = tmp_path / "three"
    shutil.copytree(classifier, three)
    transformers.LlamaForSequenceClassification(config).save_pretrained(three)
    with pytest.raises(ValueError, match="a classifier with 3 labels; a reward model has one"):
        model_reward(str(three), CPU)
    broken = tmp_path / "broken"
    shutil.copytree(classifier, broken)
    (broken / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(ValueError, match="transformers cannot open it") as caught:
        model_reward(str(broken), CPU)
    assert "\n" not in str(caught.value)


CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel

class CountConfig(PretrainedConfig):
    model_type = "counting"

class CountModel(PreTrainedModel):
    config_class = CountConfig
    def __init__(self, config):
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.post_init()
    def get_scores(self, tokenizer, conversations):
        assert all(chat[-1]["role"] == "assistant" for chat in conversations)
        return [float(len(chat[-1]["content"])) + len(chat) for chat in conversations]
"""


def test_internlm2_rewards_kind_needs_leave_to_run_its_code(tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="install minimind[export]: needs transformers")
    from safetensors.torch import save_file

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = tmp_path / "counting"
    load_tokenizer().save(path)
    (path / "modeling_counting.py").write_text(CODE)
    auto = {"AutoConfig": "modeling_counting.CountConfig", "AutoModel": "modeling_counting.CountModel"}
    (path / "config.json").write_text(json.dumps({"model_type": "counting", "auto_map": auto}))
    save_file({"weight": torch.ones(1)}, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="brings its own Python code; read it, then allow it with --trust-remote-code"):
        parse_rewards([f"model={path}"])
    scores = parse_rewards([f"model={path}"], trust_remote_code=True)(SAMPLES)
    assert scores.total.tolist() == [len(one.text) + len(one.prompt) + 1 for one in SAMPLES]


def test_a_tokenizer_of_more_ids_than_the_model_is_refused(tmp_path):
    save_value_model(ValueModel(dataclasses.replace(TINY, vocab_size=6300)), tmp_path)
    load_tokenizer().save(tmp_path)
    with pytest.raises(ValueError, match=r"model=\S+: the tokenizer has 6400 ids, the model 6300 rows"):
        model_reward(str(tmp_path), CPU)
