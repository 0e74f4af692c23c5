"""Packaging: the library `minimind`, with the Triton kernels of ./kernels mapped to `minimind.kernels`.

kernels/ has no __init__.py on purpose: with one, `import kernels` would work from the repository root and
transformers' probe for its optional package of that name would find ours.
"""

from setuptools import setup

setup(
    name="minimind",
    version="0.1.0",
    description="Train tiny language models from scratch as fast as the hardware allows",
    python_requires=">=3.10",
    packages=[
        "minimind",
        "minimind.data",
        "minimind.inference",
        "minimind.kernels",
        "minimind.objectives",
        "minimind.tokenization",
        "minimind.training",
    ],
    package_dir={"minimind": "minimind", "minimind.kernels": "kernels"},
    package_data={"minimind.tokenization": ["default/*.json"]},
    install_requires=[
        "filelock>=3.13",
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
        "gpu": ["triton>=3.6; platform_system == 'Linux'"],
        "serve": ["fastapi>=0.115", "uvicorn>=0.32"],
        "export": ["gguf>=0.10", "huggingface_hub>=0.26", "transformers>=4.57"],
        "track": ["tensorboard>=2.18", "wandb>=0.18", "swanlab>=0.10"],
        "dev": [
            "hypothesis>=6.100",
            "mypy>=1.11",
            "pre-commit>=4.0",
            "pytest>=8.3",
            "ruff>=0.8",
            "tensorboard>=2.18",
            "transformers>=4.57",
            "triton>=3.6; platform_system == 'Linux'",
        ],
    },
)
