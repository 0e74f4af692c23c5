"""Promises about the repository itself."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = [*sorted(f"train/{path.name}" for path in (ROOT / "train").glob("*.py")), "bench/throughput.py"]


def python(code: str, cwd: Path = ROOT) -> str:
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120
    )
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


def test_data_workers_need_no_torch():
    code = (
        "import sys, minimind.data, minimind.data.cache, minimind.tokenization; print('torch' in sys.modules)"
    )
    assert python(code) == "False"


def test_arrows_point_one_way():
    """kernels import nothing else of minimind; the model does not know the stages; data knows no model."""
    allowed = {
        "kernels": {"kernels"},
        "minimind/modeling.py": {"attention", "config", "ops", "rope"},
        "minimind/ops.py": {"attention", "expert_linear", "kernels", "native"},
        "minimind/document_attention.py": {"native"},
        "minimind/native.py": {"native_build"},
        "minimind/lora.py": {"modeling"},
        "minimind/lora_files.py": {"lora", "modeling", "weights"},
        "minimind/objectives": {"attention", "modeling", "objectives", "ops", "spans", "value_head"},
        "minimind/data": {"data"},
        "minimind/tokenization": {"tokenization"},
        "minimind/inference": {
            "config",
            "data",
            "device",
            "display",
            "inference",
            "kernels",
            "lora",
            "lora_files",
            "modeling",
            "native",
            "ops",
            "rope",
            "tokenization",
            "varlen",
            "weights",
        },
    }
    for place, modules in allowed.items():
        path = ROOT / place
        for file in [path] if path.is_file() else path.rglob("*.py"):
            for line in file.read_text(encoding="utf-8").splitlines():
                words = line.split()
                if words[:1] in (["from"], ["import"]) and words[1].split(".")[0] == "minimind":
                    parts = (
                        words[1].split(".") if len(words[1].split(".")) > 1 else ["", words[3].rstrip(",")]
                    )
                    assert parts[1] in modules, f"{file.relative_to(ROOT)}: {line}"


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
