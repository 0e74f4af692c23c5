"""Promises about the repository itself."""

import ast
import re
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = [*sorted(f"train/{path.name}" for path in (ROOT / "train").glob("*.py")), "bench/throughput.py"]


def python(code: str, cwd: Path = ROOT) -> str:
    answer = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip()


def test_kernels_folder_is_no_package_that_transformers_finds():
    pytest.importorskip("transformers", reason="install minimind[export] to probe transformers")
    code = "from transformers.utils import is_kernels_available as f; import transformers.modeling_utils; print(f())"
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert python(code) == "False"


@pytest.mark.parametrize("cwd", [ROOT, ROOT.parent])
def test_kernels_import_as_part_of_minimind(cwd):
    code = "import minimind.kernels.triton_support as t; print(t.__file__)"
    assert Path(python(code, cwd)) == ROOT / "kernels" / "triton_support.py"
    code = "import importlib.util as u, minimind; print(bool(minimind.kernels), u.find_spec('minimind.kernels').name)"
    assert python(code, cwd) == "True minimind.kernels"


def test_every_package_is_installed():
    listed = re.findall(r'^        "minimind\.?([\w.]*)",$', (ROOT / "setup.py").read_text(), re.MULTILINE)
    folders = {path.parent.relative_to(ROOT / "minimind") for path in (ROOT / "minimind").rglob("__init__.py")}
    packages = {".".join(folder.parts) for folder in folders}
    assert set(listed) == packages | {"kernels", "train"} and len(listed) == len(set(listed))


def test_data_workers_and_the_chat_page_need_no_torch():
    modules = "minimind.data, minimind.data.cache, minimind.tokenization, minimind.environments.builtin"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    assert python(code) == "False"


# What each room of minimind/ may import; a folder inside a folder is a room of its own.
ARROWS = {
    "kernels": "",
    "utils": "",
    "tokenization": "",
    "ops": "kernels",
    "config": "",
    "rope": "config",
    "modeling": "config ops rope",
    "lora": "modeling",
    "weights": "config lora modeling",
    "lora_files": "lora modeling weights",
    "value_head": "config lora lora_files modeling ops weights",
    "data/builtin": "utils",
    "data": "data/builtin tokenization utils",
    "objectives": "modeling ops utils value_head",
    "rewards": "tokenization utils value_head weights",
    "environments": "inference rewards tokenization utils",
    "environments/builtin": "data/builtin environments utils",
    "inference/decode": "config kernels modeling ops rope",
    "inference": "config inference/decode kernels lora lora_files modeling ops rope tokenization utils weights",
    "evaluation": "config data environments environments/builtin inference inference/decode modeling ops serving "
    "tokenization utils",
    "apps": "environments environments/builtin inference tokenization",
    "apps/zero": "data utils",
    "serving": "environments environments/builtin inference tokenization",
    "export": "config inference lora lora_files modeling tokenization weights",
    "training": "config data kernels lora lora_files modeling objectives ops tokenization utils value_head weights",
    "training/stages": "data data/builtin inference lora lora_files modeling objectives ops tokenization training "
    "utils value_head",
    "training/rl": "config data data/builtin environments inference inference/decode lora lora_files modeling "
    "objectives rewards tokenization training training/stages utils value_head weights",
    "cli": "utils",
    "__main__": "cli",
}


def room(module: str) -> str:
    """The room of a module, such as training/rl of minimind.training.rl.stage."""
    parts = module.split(".")[1:]
    inner = "/".join(parts[:2])
    return inner if (ROOT / "minimind" / inner).is_dir() and len(parts) > 1 else parts[0]


def imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from (f"{node.module}.{name.name}" for name in node.names)


def test_arrows_point_one_way():
    """Every room imports what the table says and nothing else, and the table has no circle."""
    found: dict[str, set[str]] = {}
    for folder in (ROOT / "minimind", ROOT / "kernels"):
        for file in folder.rglob("*.py"):
            parts = file.relative_to(ROOT).with_suffix("").parts
            if parts == ("minimind", "__init__"):
                continue
            module = ".".join(parts if parts[0] == "minimind" else ("minimind", *parts))
            names = found.setdefault(room(module), set())
            names |= {room(name) for name in imported(file) if name.startswith("minimind.")} - {room(module)}
    wanted = {name: set(allowed.split()) for name, allowed in ARROWS.items()}
    assert {name: names - {"__version__"} for name, names in found.items()} == wanted
    list(TopologicalSorter(wanted).static_order())  # CycleError: a circle


def test_no_two_classes_have_one_name():
    names = Counter(
        node.name
        for folder in ("minimind", "kernels", "train", "bench")
        for file in (ROOT / folder).rglob("*.py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name != "Args"  # the flags of a command
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_files_that_texts_name_exist():
    """Paths from the root, such as minimind/data/cache.py, in sources and pages. docs/LOG.md tells of the past."""
    path = re.compile(r"(?<![\w/.-])(?:minimind|train|bench|tests)/[a-z0-9_./-]+\.(?:py|md|sh)\b")
    folders = ("minimind", "kernels", "train", "bench", "tests", "csrc", "docs")
    files = [*ROOT.glob("*.*"), *(file for folder in folders for file in (ROOT / folder).rglob("*.*"))]
    suffixes = (".py", ".md", ".h", ".cuh", ".cu", ".cpp", ".toml")
    texts = [file for file in files if file.suffix in suffixes and file.name != "LOG.md"]
    named = {(f.name, name) for f in texts for name in path.findall(f.read_text(encoding="utf-8"))}
    assert len(named) > 100 and [pair for pair in sorted(named) if not (ROOT / pair[1]).exists()] == []


def test_readme_names_commands_that_exist():
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md"))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert not re.search(r"@[A-Z]+@", text), "a placeholder was left in the README"
    for target in ("demo", "test", "lint", "venv"):
        assert f"make {target}" in text and f"\n{target}:" in makefile
    for script in SCRIPTS:
        assert script in text and (ROOT / script).exists()


def test_help_works():
    """Every script as `python SCRIPT --help` runs it, in one process, as most of the time goes to imports."""
    code = """
        import contextlib, io, runpy, sys
        for script in sys.argv[1:]:
            sys.argv, shown = [script, "--help"], io.StringIO()
            with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
                runpy.run_path(script, run_name="__main__")
            assert "usage:" in shown.getvalue(), script
    """
    command = [sys.executable, "-c", textwrap.dedent(code), *(str(ROOT / script) for script in SCRIPTS)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stdout + answer.stderr
