"""The Python code of the guide pages runs unchanged."""

import importlib.util
import re
from pathlib import Path

import pytest

from minimind import ModelConfig, cli, load_model, load_tokenizer
from minimind.lora_files import load_adapter
from minimind.weights import save_weights
from tests import foreign
from tests.export.small import model_of

DOCS = Path(__file__).parents[2] / "docs" / "export"


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture
def exported(tmp_path, monkeypatch):
    """A nano model as `my-model` and `my-model.gguf` in the working directory."""
    save_weights(model_of(ModelConfig.preset("nano")), tmp_path / "run")
    load_tokenizer().save(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for target, out in (("hf", "my-model"), ("gguf", "my-model.gguf")):
        assert cli.run(["export", "--model", "run", "--to", target, "--out", out]) == 0


def run(page: str) -> int:
    scope: dict = {}
    for block in blocks(page):
        exec(compile(block, page, "exec"), scope)
    return len(blocks(page))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_transformers_page(exported):
    for package in ("gguf", "transformers", "trl", "peft", "datasets"):
        pytest.importorskip(package, reason=f"pip install {package}")
    assert run("transformers.md") == 3
    model = load_model("my-model")
    assert set(load_adapter(model, "my-adapter").targets or ()) == {"q_proj", "v_proj"}


@pytest.mark.slow
def test_llama_cpp_page(exported):
    for package in ("gguf", "llama_cpp"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"pip install {package}")
    (block,) = blocks("llama.cpp.md")
    foreign.call("llama.cpp", exec, f"import os; os.chdir({str(Path.cwd())!r})\n{block}")


def test_links_and_flags_of_the_pages():
    """The pages link to existing pages, and use only flags and targets that `minimind export` has."""
    pages = {page.name: page.read_text(encoding="utf-8") for page in DOCS.glob("*.md")}
    assert len(pages) == 7
    for name, text in pages.items():
        for link in re.findall(r"\]\(([^)#]+\.md)\)", text):
            assert (DOCS / link).exists(), f"{name}: {link}"
        for line in re.findall(r"^ +minimind export (.*?)(?: +#.*)?$", text, re.M):
            flags = set(re.findall(r"--[a-z-]+", line))
            assert flags <= {"--model", "--to", "--out", "--dtype", "--lora", "--merge-lora"}, line
            target = re.search(r"--to (\S+)", line)
            assert target is None or target[1] in ("hf", "gguf", "ollama", "pth"), line
