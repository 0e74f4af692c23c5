"""Models by their names on Hugging Face and ModelScope: download, cache and pin them.

    jingyaogong/MiniMind2              Hugging Face, the newest revision
    jingyaogong/MiniMind2@0a1b2c3      one revision: a commit, a branch or a tag
    modelscope:gongjy/MiniMind2        ModelScope, with the package of that name

A name that could be a path is a path: one that exists, one in a folder that exists, and one with the ending of a weight
file. Files are kept in the hubs' own caches, which serve when there is no network.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NAME = re.compile(r"(?:(?P<hub>hf|modelscope):)?(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_TITLES = {"hf": "Hugging Face", "modelscope": "ModelScope"}
_WEIGHT_FILES = (".pth", ".pt", ".bin", ".safetensors", ".gguf")
_TEXT = ["*.json", "*.jinja"]


@dataclass(frozen=True)
class HubModel:
    """hub: "hf" or "modelscope"; repo: owner/name; revision: None for the newest."""

    hub: str
    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "")

    @staticmethod
    def parse(name: str) -> HubModel | None:
        """The model on a hub that `name` stands for; None where it is a path."""
        match = _NAME.fullmatch(name)
        if match is None or name.endswith(_WEIGHT_FILES):
            return None
        owner = match["repo"].partition("/")[0]
        if match["hub"] is None and (owner == "runs" or Path(owner).exists()):
            return None
        return HubModel(match["hub"] or "hf", match["repo"], match["revision"])


def local_path(name: str, flag: str, report: Callable[[str], Any]) -> Path:
    """The path that `name` is, or the folder of the model on a hub that it names, which is downloaded unless it is in
    the cache. report: called with a line about the revision. ValueError, one line that begins with `flag`."""
    model = HubModel.parse(name)
    if model is None:
        return Path(name).expanduser()
    fetch = _huggingface if model.hub == "hf" else _modelscope
    where = f"{flag} {name}"
    folder = fetch(model, [*_TEXT, "*.safetensors"], where)
    if not any(folder.glob("*.safetensors")):
        folder = fetch(model, [*_TEXT, "pytorch_model*.bin"], where)
    pinned = f"; {model.repo}@{folder.name} pins it" if model.hub == "hf" and model.revision != folder.name else ""
    report(f"{model}: from {_TITLES[model.hub]}, in {folder}{pinned}")
    return folder


def _huggingface(model: HubModel, patterns: Sequence[str], where: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = snapshot_download(
            model.repo,
            revision=model.revision,
            allow_patterns=list(patterns),
            endpoint=os.environ.get("HF_ENDPOINT") or None,
        )
    except GatedRepoError:
        raise ValueError(f"{where}: Hugging Face asks for consent first; give it there, then `hf auth login`") from None
    except RepositoryNotFoundError:
        raise ValueError(f"{where}: no such file or folder, and no public model of that name on Hugging Face") from None
    except RevisionNotFoundError:
        raise ValueError(f"{where}: {model.repo} on Hugging Face has no revision {model.revision}") from None
    except LocalEntryNotFoundError:
        raise ValueError(
            f"{where}: no such file or folder, Hugging Face cannot be reached, and its cache does not have the model; "
            "name a folder, or try again with a network or a mirror in HF_ENDPOINT"
        ) from None
    except (OSError, ValueError) as problem:  # HfHubHTTPError is an OSError
        raise ValueError(f"{where}: Hugging Face: {_line(problem)}") from None
    return Path(folder)


def _modelscope(model: HubModel, patterns: Sequence[str], where: str) -> Path:
    try:
        hub = importlib.import_module("modelscope.hub.snapshot_download")
    except ImportError:
        raise ValueError(f"{where}: the package is not installed; run `pip install 'minimind[modelscope]'`") from None
    options: dict[str, Any] = {"revision": model.revision, "allow_patterns": list(patterns)}
    try:
        return Path(hub.snapshot_download(model.repo, **options))
    except Exception as problem:  # of many kinds, from several libraries
        reason = _line(problem)
    try:
        return Path(hub.snapshot_download(model.repo, **options, local_files_only=True))
    except Exception:
        raise ValueError(
            f"{where}: ModelScope does not give it ({reason}), and its cache does not have it; name a folder, or try "
            "Hugging Face: the name without modelscope:"
        ) from None


def _line(problem: BaseException) -> str:
    return str(problem).strip().partition("\n")[0] or type(problem).__name__
