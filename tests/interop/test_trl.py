"""trl and peft on exported folders: many steps of SFT, DPO, GRPO and LoRA, and the way back; adapters both ways."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from minimind import load_model
from minimind.inference.generate import generate
from minimind.lora_files import load_adapter, save_adapter
from minimind.modeling import Model
from tests import foreign
from tests.export.small import CONFIGS, model_of
from tests.interop import programs
from tests.interop.neighbours import PROMPTS, adapted, program, shapes, write

pytestmark = pytest.mark.interop
FAMILIES = ("llama", "qwen3", "qwen3moe", "granitemoe")
STEPS = {"sft": (12, 3e-3), "dpo": (6, 1e-3), "grpo": (20, 3e-3), "lora": (12, 1e-2)}
JOBS = [
    *((way, name) for way in ("sft", "peft") for name in FAMILIES),
    *(("lora", name) for name in ("llama", "granitemoe")),
    *(("grpo", name) for name in ("qwen3", "granitemoe")),
    ("dpo", "qwen3moe"),
]
NEW = 24


def adapted_family(name: str) -> Model:
    return adapted(name, ("q_proj", "v_proj") if CONFIGS[name].num_experts else None)


@pytest.fixture(scope="module")
def trained(request, tmp_path_factory) -> dict[tuple[str, str], dict[str, Any]]:
    python, place, jobs = program("TRL"), tmp_path_factory.mktemp("trl"), []
    own = [item for item in request.session.items if "trained" in item.fixturenames]
    selected = {tuple(item.callspec.params[key] for key in ("way", "name")) for item in own}
    chosen = [job for job in JOBS if job in selected]
    for way, name in chosen:
        folder = place / f"{way}-{name}"
        job: dict[str, Any] = {"way": way, "folder": write(model_of(shapes()[name]), folder)}
        if way == "peft":
            save_adapter(adapted_family(name), folder / "adapter", base_model=folder)
        else:
            steps, rate = STEPS[way]
            job |= {"out": str(place / f"{way}-{name}-out"), "steps": steps, "rate": rate}
        jobs.append(job)
    found = foreign.call("trl", programs.trl_train, jobs, PROMPTS, NEW, python=python, timeout=3600)
    return {key: {**job, **result} for key, job, result in zip(chosen, jobs, found, strict=True)}


@pytest.mark.parametrize("way, name", JOBS)
def test_what_they_train_or_read_writes_the_same_tokens(way, name, trained):
    result = trained[way, name]
    base = generate(model_of(shapes()[name]), PROMPTS, NEW, temperature=0.0)
    if way == "peft":
        model = adapted_family(name)
    elif way == "lora":
        model = load_model(Path(result["folder"]))
        assert load_adapter(model, result["out"]).rank == 4
    else:
        model = load_model(Path(result["out"]))
    assert generate(model.eval(), PROMPTS, NEW, temperature=0.0) == result["tokens"] != base


@pytest.mark.parametrize("way, name", [job for job in JOBS if job[0] != "peft"])
def test_they_learn(way, name, trained):
    log = trained[way, name]["log"]
    assert len(log) == STEPS[way][0]
    if way == "grpo":
        rewards = [row["reward"] for row in log]
        assert fmean(rewards[-5:]) > fmean(rewards[:5]) + 0.1
    else:
        assert log[-1]["loss"] < 0.8 * log[0]["loss"]
