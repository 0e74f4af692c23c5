import json
import random
from pathlib import Path

import pytest

from tests.training.runs import learn


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Sums in words: something a tiny model can learn, made here."""
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for _ in range(3000):
            a, b = rng.randrange(6), rng.randrange(5)
            file.write(json.dumps({"text": f"{words[a]} and {words[b]} make {words[a + b]}."}) + "\n")
    return path


@pytest.fixture(scope="session")
def prompts(tmp_path_factory) -> Path:
    """Questions for the reinforcement learners."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"conversations": [{"role": "user", "content": f"Say {i}."}]} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def taught(tmp_path_factory) -> Path:
    """A folder in which a nano was pretrained and taught to answer, as `minimind demo` does, but with less text. The
    slow tests of later stages start from it."""
    place = tmp_path_factory.mktemp("taught")
    learn("pretrain", place, "--tokens", "300_000", "--evals", "1")
    learn("sft", place, "--evals", "2")
    return place
