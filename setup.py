"""Packaging: the library `minimind`, with the Triton kernels of ./kernels mapped to `minimind.kernels` and the stages'
scripts of ./train to `minimind.train`, where `minimind zero` finds them.

kernels/ has no __init__.py on purpose: with one, `import kernels` would work from the repository root and
transformers' probe for its optional package of that name would find ours.

csrc/, the native operators, are built by CMake into the package where a C++ compiler is found, with CUDA where nvcc is;
minimind/ops/native_build.py has the details. Not having them never fails an installation: decoding then runs in
plain PyTorch, and says why.
"""

import importlib.util
import shutil
from pathlib import Path
from typing import ClassVar

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
PLAN = importlib.util.spec_from_file_location("native_build", ROOT / "minimind" / "ops" / "native_build.py")
native_build = importlib.util.module_from_spec(PLAN)  # alone: the package needs torch, which is not there yet
PLAN.loader.exec_module(native_build)


class NativeBuild(build_ext):
    """Runs CMake in place of the compiler of setuptools."""

    files: ClassVar[list[Path]] = []

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        package = ROOT / "minimind" if in_place else Path(self.build_lib) / "minimind"
        package.mkdir(parents=True, exist_ok=True)
        NativeBuild.files = native_build.build_all(package)

    def get_outputs(self) -> list[str]:
        return [str(file) for file in self.files]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlatformWheel(bdist_wheel):
    """The libraries depend on the platform, not on Python: they speak C alone."""

    def get_tag(self) -> tuple[str, str, str]:
        built = len(NativeBuild.files) > 1  # more than the report
        return "py3", "none", super().get_tag()[2] if built else "any"


def build_tools() -> list[str]:
    """Wheels of cmake and ninja for the build alone, where there is a compiler but they are not installed."""
    if native_build.cxx() is None:
        return []
    has_generator = shutil.which("ninja") or shutil.which("make")
    return ["cmake>=3.20"] * (not shutil.which("cmake")) + ["ninja"] * (not has_generator)


setup(
    name="minimind",
    version="0.1.0",
    description="Train tiny language models from scratch as fast as the hardware allows",
    python_requires=">=3.10",
    packages=[
        "minimind",
        "minimind.apps",
        "minimind.apps.zero",
        "minimind.data",
        "minimind.data.builtin",
        "minimind.environments",
        "minimind.environments.builtin",
        "minimind.evaluation",
        "minimind.export",
        "minimind.inference",
        "minimind.inference.decode",
        "minimind.kernels",
        "minimind.objectives",
        "minimind.ops",
        "minimind.rewards",
        "minimind.serving",
        "minimind.tokenization",
        "minimind.train",
        "minimind.training",
        "minimind.training.rl",
        "minimind.training.stages",
        "minimind.utils",
    ],
    package_dir={"minimind": "minimind", "minimind.kernels": "kernels", "minimind.train": "train"},
    ext_modules=[Extension("minimind._native", sources=[])],
    cmdclass={"build_ext": NativeBuild, "bdist_wheel": PlatformWheel},
    setup_requires=build_tools(),
    package_data={"minimind.tokenization": ["default/*.json"]},
    entry_points={"console_scripts": ["minimind = minimind.cli:main"]},
    install_requires=[
        "filelock>=3.13",
        "huggingface_hub>=0.26",
        "jinja2>=3.1.4",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "rich>=13.7",
        "safetensors>=0.4.5",
        "tokenizers>=0.21",
        "torch>=2.11",
        "tyro>=0.9",
        "zstandard>=0.22",
    ],
    extras_require={
        "gpu": ["nvtx>=0.2.11; platform_system == 'Linux'", "triton>=3.6; platform_system == 'Linux'"],
        # faster attention in training, one of them: docs/kernels.md (FlashAttention 3 is built from its repository)
        "flash2": ["flash-attn>=2.7; platform_system == 'Linux'"],
        "flash4": ["flash-attn-4; platform_system == 'Linux'"],
        "serve": ["fastapi>=0.115", "llguidance>=1.0", "prometheus_client>=0.21", "uvicorn>=0.32"],
        "web": ["minimind[serve]", "openai>=1.50", "streamlit>=1.40"],
        "export": ["gguf>=0.10", "transformers>=4.57"],
        "eval": ["lm-eval>=0.4.9"],
        "mcp": ["mcp>=2.0"],  # tools of MCP servers: docs/agents.md
        "modelscope": ["modelscope>=1.20"],
        "track": ["tensorboard>=2.18", "trackio>=0.5", "wandb>=0.18", "swanlab>=0.10"],
        "dev": [
            "fastapi>=0.115",
            "gguf>=0.10",
            "httpx>=0.27",
            "hypothesis>=6.100",
            "llguidance>=1.0",
            "mcp>=2.0",
            "mypy>=1.11",
            "nvtx>=0.2.11; platform_system == 'Linux'",
            "openai>=1.50",
            "peft>=0.17",
            "prometheus_client>=0.21",
            "pre-commit>=4.0",
            "pytest>=8.3",
            "pytest-benchmark>=5.1",
            "pytest-xdist>=3.6",
            "ruff>=0.8",
            "schemathesis>=4.0",
            "tensorboard>=2.18",
            "transformers>=4.57",
            "triton>=3.6; platform_system == 'Linux'",
            "uvicorn>=0.32",
        ],
        # what some slow tests need beside dev: other programs that take our models, a browser's driver, notebooks
        "interop": [
            "ipykernel>=6.29",
            "llama-cpp-python>=0.3",
            "lm-eval>=0.4.9",
            "nbclient>=0.10",
            "selenium>=4.25",
            "streamlit>=1.40",
            "trl>=0.24",
        ],
    },
)
