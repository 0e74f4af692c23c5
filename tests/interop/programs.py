"""What runs in the neighbours' own Pythons; nothing of this project is imported here."""

from __future__ import annotations

import gc
import os
from typing import Any


def vllm_greedy(jobs: list[dict[str, Any]], prompts: list[list[int]], new: int) -> dict[str, Any]:
    """{job's name: the greedy tokens after each prompt, in float32, or the error}; a job has a name, a folder and
    perhaps an adapter."""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    settings = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
    asked: Any = [{"prompt_token_ids": ids} for ids in prompts]
    found: dict[str, Any] = {}
    for job in jobs:
        more = {"enable_lora": True, "max_lora_rank": 8} if "adapter" in job else {}
        lora = LoRARequest("mine", 1, job["adapter"]) if "adapter" in job else None
        model = None
        try:
            model = LLM(job["folder"], dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=4, **more)
            written = model.generate(asked, settings, lora_request=lora, use_tqdm=False)
            found[job["name"]] = [list(row.outputs[0].token_ids) for row in written]
        except Exception as error:
            found[job["name"]] = f"{type(error).__name__}: {error}"
        del model
        gc.collect()
    return found


def greedy(model: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    """The likeliest tokens after each prompt, all of one length, of a model of transformers."""
    import torch

    ids = torch.tensor(prompts)
    with torch.no_grad():
        for _ in range(new):
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    return ids[:, len(prompts[0]) :].tolist()


def trl_train(jobs: list[dict[str, Any]], prompts: list[list[int]], new: int) -> list[dict[str, Any]]:
    """Train each job's `folder` by its `way` (sft, lora, dpo or grpo) for `steps` into `out`; gives the logged figures
    and the greedy tokens of the model that was saved. The way "peft" only reads a folder's adapter."""
    import peft
    import transformers
    import trl
    from datasets import Dataset

    asked = [{"role": "user", "content": "2+2?"}]
    four, five = ([{"role": "assistant", "content": text}] for text in ("It is four.", "It is five."))
    rows = {
        "sft": {"messages": asked + four},
        "lora": {"messages": asked + four},
        "dpo": {"prompt": asked, "chosen": four, "rejected": five},
        "grpo": {"prompt": asked},
    }
    kinds: dict[str, tuple[Any, Any]] = {
        "sft": (trl.SFTTrainer, trl.SFTConfig),
        "lora": (trl.SFTTrainer, trl.SFTConfig),
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
        "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
    }
    more: dict[str, dict[str, Any]] = {"grpo": {"num_generations": 4, "max_completion_length": 8, "beta": 0.0}}
    found = []
    for job in jobs:
        way, out = job["way"], job.get("out", job["folder"] + "/adapter")
        if way != "peft":
            trainer_class, config_class = kinds[way]
            settings = config_class(
                output_dir=out, max_steps=job["steps"], per_device_train_batch_size=4, use_cpu=True, bf16=False,
                report_to="none", save_strategy="no", disable_tqdm=True, learning_rate=job["rate"], logging_steps=1,
                lr_scheduler_type="constant", seed=0, **more.get(way, {"max_length": 64}),
            )  # fmt: skip
            lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
            extra: dict[str, Any] = {"peft_config": lora} if way == "lora" else {}
            if way == "grpo":
                extra["reward_funcs"] = low_ids
            data = Dataset.from_list([rows[way]] * 4)
            trainer = trainer_class(job["folder"], args=settings, train_dataset=data, **extra)
            trainer.train()
            trainer.save_model(out)
        adapted = way in ("lora", "peft")
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(job["folder"] if adapted else out)
        if adapted:
            model = peft.PeftModel.from_pretrained(model, out)
        log = [] if way == "peft" else [row for row in trainer.state.log_history if "loss" in row]
        found.append({"log": log, "tokens": greedy(model.eval(), prompts, new)})
    return found


def low_ids(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that anyone can raise: the share of tokens in the lower half of the vocabulary."""
    return [sum(token < 3200 for token in ids) / max(1, len(ids)) for ids in completion_ids]


def mnn_chat(folder: str, questions: list[str]) -> list[dict[str, Any]]:
    """For each question the prompt's text, its token ids, and the greedy answer in float32 arithmetic."""
    import json

    import MNN.llm

    with open(f"{folder}/config.json", encoding="utf-8") as file:
        config = json.load(file)
    config |= {"sampler_type": "greedy", "precision": "high", "memory": "normal", "thread_num": 1}
    with open(f"{folder}/exact.json", "w", encoding="utf-8") as file:
        json.dump(config, file)
    model = MNN.llm.create(f"{folder}/exact.json")
    model.load()
    found = []
    for question in questions:
        prompt = model.apply_chat_template(question)
        found.append({"prompt": prompt, "ids": model.tokenizer_encode(prompt), "text": model.response(question)})
        model.reset()
    return found


def llama_factory(
    folder: str, adapter: str, conversations: list[list[dict[str, str]]], prompts: list[list[int]], new: int
) -> dict[str, Any]:
    """The ids of each conversation with the settings of LLaMA-Factory's guide page, and the greedy tokens of the model
    with the adapter."""
    import peft
    import transformers
    from llamafactory.data.template import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    template = get_template_and_fix_tokenizer(tokenizer, DataArguments(template="qwen", default_system=""))
    ids = []
    for turns in conversations:
        system = turns[0]["content"] if turns[0]["role"] == "system" else None
        pairs = template.encode_multiturn(tokenizer, turns[1:] if system else turns, system)
        ids.append([token for pair in pairs for part in pair for token in part])
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model = peft.PeftModel.from_pretrained(model, adapter)
    return {"ids": ids, "tokens": greedy(model.eval(), prompts, new)}
