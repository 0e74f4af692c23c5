"""What a hub says about the files of a data set: names, sizes, SHA-256, and where to fetch them.

ModelScope and Hugging Face are asked by plain HTTPS, as their own clients do; public data needs no account.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote, urlencode

HubName = Literal["modelscope", "huggingface"]
OTHER = {"modelscope": "huggingface", "huggingface": "modelscope"}
TIMEOUT = 30.0  # seconds without an answer


@dataclass(frozen=True)
class RemoteFile:
    """size in bytes and sha256 in hex, None where the hub does not say."""

    name: str
    url: str
    size: int | None
    sha256: str | None


def list_files(hub: HubName, repo: str, endpoint: str | None = None) -> dict[str, RemoteFile]:
    """The files of the data set `repo` (owner/name) by name.

    endpoint: another address of the hub, such as a mirror's. ValueError, one line, where it does not answer or has no
    such data set.
    """
    if hub == "modelscope":
        return _modelscope(repo, endpoint or "https://www.modelscope.cn")
    return _huggingface(repo, endpoint or os.environ.get("HF_ENDPOINT") or "https://huggingface.co")


def open_url(url: str, headers: dict[str, str] | None = None) -> Any:
    """The response; redirects are followed, proxies are those of the environment."""
    request = urllib.request.Request(url, headers={"User-Agent": "minimind", **(headers or {})})
    return urllib.request.urlopen(request, timeout=TIMEOUT)


def _modelscope(repo: str, endpoint: str) -> dict[str, RemoteFile]:
    base = f"{endpoint.rstrip('/')}/api/v1/datasets/{quote(repo)}/repo"
    query = {"Revision": "master", "Root": "/", "Recursive": "True", "PageNumber": 1, "PageSize": 1000}
    answer = _json(f"{base}/tree?{urlencode(query)}", "modelscope", repo)
    entries = _entries(answer, "modelscope", "Data", "Files")
    files = {}
    for entry in entries:
        if entry.get("Type") != "tree":
            name = entry["Path"]
            where = urlencode({"Source": "SDK", "Revision": "master", "FilePath": name})
            files[name] = RemoteFile(name, f"{base}?{where}", entry.get("Size"), entry.get("Sha256") or None)
    return files


def _huggingface(repo: str, endpoint: str) -> dict[str, RemoteFile]:
    endpoint = endpoint.rstrip("/")
    answer = _json(f"{endpoint}/api/datasets/{quote(repo)}/tree/main?recursive=true", "huggingface", repo)
    files = {}
    for entry in _entries(answer, "huggingface"):
        if entry.get("type") == "file":
            name, large = entry["path"], entry.get("lfs") or {}  # only files in LFS have a SHA-256 there
            url = f"{endpoint}/datasets/{quote(repo)}/resolve/main/{quote(name)}"
            files[name] = RemoteFile(name, url, large.get("size", entry.get("size")), large.get("oid"))
    return files


def _entries(answer: Any, hub: HubName, *path: str) -> list[dict[str, Any]]:
    for key in path:
        answer = answer.get(key) if isinstance(answer, dict) else None
    if not isinstance(answer, list):
        raise ValueError(f"{hub} answered something else than a list of files; try --hub {OTHER[hub]}")
    return answer


def _json(url: str, hub: HubName, repo: str) -> Any:
    try:
        with open_url(url) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403, 404):
            raise ValueError(f"{hub}: there is no public data set {repo} (HTTP {error.code})") from None
        raise ValueError(f"{hub}: HTTP {error.code} for {repo}; try again, or --hub {OTHER[hub]}") from None
    except (OSError, ValueError) as error:  # no network, a timeout, no JSON
        reason = getattr(error, "reason", None) or error
        raise ValueError(f"{hub} does not answer ({reason}); try --hub {OTHER[hub]}, or --endpoint") from None
