"""notebooks/quickstart.ipynb: its text, and all of its cells with the smallest training."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from minimind.cli import COMMANDS

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
SMALLEST = "--stages pretrain sft --flags pretrain='--tokens 20_000 --evals 1' sft='--tokens 20_000 --eval-questions 4'"


def cells(kind: str) -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def test_it_is_stored_without_outputs_and_names_commands_that_exist():
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells("code"))
    for cell in cells("code"):
        compile(re.sub(r"^[!%].*$", "", "".join(cell["source"]), flags=re.M), NOTEBOOK.name, "exec")
    text = "".join("".join(cell["source"]) for kind in ("code", "markdown") for cell in cells(kind))
    named = re.findall(r"minimind (\w+) -", text)
    assert {"demo", "zero", "chat", "export"} <= set(named) <= COMMANDS.keys()
    assert all((ROOT / script).exists() for script in re.findall(r"train/\w+\.py", text))


@pytest.mark.slow
def test_every_cell_runs(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="pip install 'minimind[interop]'")
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    tags = {tag: cell for cell in notebook.cells for tag in cell.metadata.get("tags", ())}
    tags["install"].source = ""  # it is installed
    tags["parameters"].source = f'FOLDER = "runs/demo"\nFLAGS = """{SMALLEST} --cache-dir {tmp_path / "cache"}"""'
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    kernel = {"resources": {"metadata": {"path": str(tmp_path)}}, "timeout": 900, "kernel_name": "python3"}
    nbclient.NotebookClient(notebook, **kernel).execute()
    said = {cell.id: "".join(o.get("text", "") for o in cell.outputs) for cell in notebook.cells if "outputs" in cell}
    shown = [o["data"] for cell in notebook.cells for o in cell.get("outputs", ()) if "data" in o]
    assert "stage 2 of 2, sft" in "".join(said.values())
    assert any("Hi! What is 8 + 6?\n    " in text for text in said.values())
    assert any(
        "<iframe" in data.get("text/html", "") and "parameters, from random weights" in data["text/html"]
        for data in shown
    )
    assert (tmp_path / "runs/demo/report/index.html").is_file()
