"""An exported model in trl and peft: one step of each trainer."""

import pytest
import torch

from minimind import load_model, load_tokenizer
from minimind.export.hf import export_hf
from tests.export.small import CONFIGS, model_of

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
pytest.importorskip("transformers", reason="install minimind[export]")
trl = pytest.importorskip("trl", reason="needs trl: pip install trl")
peft = pytest.importorskip("peft", reason="install minimind[dev]")
datasets = pytest.importorskip("datasets", reason="needs trl: pip install trl")

ANSWER = [{"role": "assistant", "content": "Four."}]
QUESTION = [{"role": "user", "content": "2+2?"}]


@pytest.fixture(params=["llama", "qwen3", "qwen3moe", "granitemoe"])
def folder(request, tmp_path):
    export_hf(model_of(CONFIGS[request.param]), load_tokenizer(), tmp_path / "base")
    return tmp_path / "base"


def settings(kind, folder, **more):
    return kind(
        output_dir=str(folder / "out"), max_steps=1, per_device_train_batch_size=2, use_cpu=True, bf16=False,
        report_to="none", save_strategy="no", disable_tqdm=True, learning_rate=1e-3, max_length=64, **more,
    )  # fmt: skip


def check_trained(trainer, before: dict[str, torch.Tensor]) -> None:
    found = trainer.train()
    assert found.global_step == 1 and 0 < found.training_loss < 50
    after = dict(trainer.model.named_parameters())
    moved = [name for name, old in before.items() if not torch.equal(old, after[name])]
    assert moved and all(parameter.isfinite().all() for parameter in after.values())


def parameters(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_sft_step_and_back(folder, tmp_path):
    rows = datasets.Dataset.from_list([{"messages": QUESTION + ANSWER}] * 2)
    trainer = trl.SFTTrainer(str(folder), settings(trl.SFTConfig, tmp_path), train_dataset=rows)
    check_trained(trainer, parameters(trainer))
    trainer.save_model(str(tmp_path / "trained"))
    theirs = trainer.model.eval()
    ids = torch.arange(20, 50).unsqueeze(0)
    with torch.no_grad():
        ours, base = load_model(tmp_path / "trained")(ids).logits, load_model(folder)(ids).logits
        difference = (ours - theirs(ids).logits).abs().max()
    assert difference < 1e-4 * (ours - base).abs().max(), "what trl trained is what opens here"


def test_dpo_step(folder, tmp_path):
    rows = datasets.Dataset.from_list(
        [{"prompt": QUESTION, "chosen": ANSWER, "rejected": [{"role": "assistant", "content": "Five."}]}] * 2
    )
    trainer = trl.DPOTrainer(str(folder), args=settings(trl.DPOConfig, tmp_path), train_dataset=rows)
    check_trained(trainer, parameters(trainer))


def test_peft_lora_step(folder, tmp_path):
    rows = datasets.Dataset.from_list([{"messages": QUESTION + ANSWER}] * 2)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = trl.SFTTrainer(str(folder), settings(trl.SFTConfig, tmp_path), train_dataset=rows, peft_config=lora)
    before = parameters(trainer)
    assert before and all("lora_" in name for name in before)
    check_trained(trainer, before)
    trainer.save_model(str(tmp_path / "adapter"))

    from minimind.lora_files import load_adapter

    model = load_model(folder)
    assert load_adapter(model, tmp_path / "adapter").rank == 4
