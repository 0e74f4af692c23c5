"""Download upstream MiniMind's data sets from ModelScope or Hugging Face.

    minimind data download                          lists the files
    minimind data download pretrain_hq sft_mini_512
    minimind data download sft_512 dpo --hub huggingface --out dataset
    minimind data download x --repo owner/name      from another data set repository

An interrupted download resumes where it stopped. Size and SHA-256 are checked against the hub's. Public data needs no
account.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote, urlencode, urlsplit

import tyro
from rich.console import Console

from minimind.utils.display import ByteProgress, say
from minimind.utils.files import is_disk_full, locked, sync

HubName = Literal["modelscope", "huggingface"]
OTHER_HUB: dict[HubName, HubName] = {"modelscope": "huggingface", "huggingface": "modelscope"}
# Upstream's files by stage. The second names are those of 2026, which took the place of the first on the hubs.
FOR_STAGES = {
    "pretrain": ("pretrain_hq", "pretrain_t2t_mini"),
    "sft": ("sft_mini_512", "sft_t2t_mini"),
    "reason": ("r1_mix_1024",),
    "dpo": ("dpo",),
}
UPSTREAM: dict[HubName, str] = {"modelscope": "gongjy/minimind_dataset", "huggingface": "jingyaogong/minimind_dataset"}
TIMEOUT = 30.0  # seconds without an answer


@dataclass(frozen=True)
class RemoteFile:
    """size: bytes; sha256: in hex; both None if the hub does not give them."""

    name: str
    url: str
    size: int | None
    sha256: str | None


def list_files(hub: HubName, repo: str, endpoint: str | None = None) -> dict[str, RemoteFile]:
    """The files of the data set `repo` (owner/name), by name.

    endpoint: another address of the hub, such as a mirror. Raises ValueError, in one line, if the hub does not answer
    or has no such data set.
    """
    if hub == "modelscope":
        return _modelscope(repo, endpoint or "https://www.modelscope.cn")
    return _huggingface(repo, endpoint or os.environ.get("HF_ENDPOINT") or "https://huggingface.co")


def open_url(url: str, headers: dict[str, str] | None = None) -> Any:
    """Open `url`, following redirects and using the proxies of the environment. Returns the response."""
    request = urllib.request.Request(url, headers={"User-Agent": "minimind", **(headers or {})})
    return urllib.request.urlopen(request, timeout=TIMEOUT)


def _modelscope(repo: str, endpoint: str) -> dict[str, RemoteFile]:
    base = f"{endpoint.rstrip('/')}/api/v1/datasets/{quote(repo)}/repo"
    query = {"Revision": "master", "Root": "/", "Recursive": "True", "PageNumber": 1, "PageSize": 1000}
    listing = _json(f"{base}/tree?{urlencode(query)}", "modelscope", repo)
    entries = _entries(listing, "modelscope", "Data", "Files")
    files = {}
    for entry in entries:
        if entry.get("Type") != "tree":
            name = entry["Path"]
            query_of_file = urlencode({"Source": "SDK", "Revision": "master", "FilePath": name})
            files[name] = RemoteFile(name, f"{base}?{query_of_file}", entry.get("Size"), entry.get("Sha256") or None)
    return files


def _huggingface(repo: str, endpoint: str) -> dict[str, RemoteFile]:
    endpoint = endpoint.rstrip("/")
    listing = _json(f"{endpoint}/api/datasets/{quote(repo)}/tree/main?recursive=true", "huggingface", repo)
    files = {}
    for entry in _entries(listing, "huggingface"):
        if entry.get("type") == "file":
            name, lfs = entry["path"], entry.get("lfs") or {}  # only files in LFS have a SHA-256
            url = f"{endpoint}/datasets/{quote(repo)}/resolve/main/{quote(name)}"
            files[name] = RemoteFile(name, url, lfs.get("size", entry.get("size")), lfs.get("oid"))
    return files


def _entries(listing: Any, hub: HubName, *path: str) -> list[dict[str, Any]]:
    for key in path:
        listing = listing.get(key) if isinstance(listing, dict) else None
    if not isinstance(listing, list):
        raise ValueError(f"{hub} did not answer with a list of files; try --hub {OTHER_HUB[hub]}")
    return listing


def _json(url: str, hub: HubName, repo: str) -> Any:
    try:
        with open_url(url) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403, 404):
            raise ValueError(f"{hub}: there is no public data set {repo} (HTTP {error.code})") from None
        raise ValueError(f"{hub}: HTTP {error.code} for {repo}; try again, or --hub {OTHER_HUB[hub]}") from None
    except (OSError, ValueError) as error:  # no network, a timeout, invalid JSON
        reason = getattr(error, "reason", None) or error
        raise ValueError(f"{hub} does not answer ({reason}); try --hub {OTHER_HUB[hub]}, or --endpoint") from None


CHUNK = 1 << 20
ATTEMPTS = 5  # give up after this many in a row without a single byte
PAUSE = 1.0  # seconds to wait before the next one, times their number so far
BROKEN = (HTTPException, ConnectionError, TimeoutError, ssl.SSLError, urllib.error.URLError)
_STAGES = {"pretrain": "pretrain", "sft": "sft", "dpo": "dpo", "r1_": "reason", "lora": "lora", "rlaif": "grpo"}


@dataclass(frozen=True)
class Args:
    """Download data sets."""

    action: Annotated[Literal["download"], tyro.conf.Positional]
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Files, with or without .jsonl: pretrain_hq, sft_mini_512, sft_512, sft_1024, sft_2048, dpo, r1_mix_1024,
    lora_identity, lora_medical, rlaif-mini, ... Leave them out to list the files."""
    hub: HubName = "modelscope"
    """modelscope (faster in China) or huggingface."""
    repo: str | None = None
    """The data set repository, owner/name. None: upstream's."""
    endpoint: str | None = None
    """Another address of the hub, such as a mirror. None: the hub's own, or $HF_ENDPOINT for Hugging Face."""
    out: str = "dataset"
    """The folder to write the files to."""


def main(args: Args) -> int:
    console = Console()
    repo = args.repo or UPSTREAM[args.hub]
    files = list_files(args.hub, repo, args.endpoint)
    if not args.names:
        for file in files.values():
            say(console, f"{file.name:<32} {_megabytes(file.size)}")
        return 0
    chosen = [_choose(name, files, args.hub, repo) for name in dict.fromkeys(args.names)]
    folder = Path(args.out).expanduser()
    for file in chosen:
        path = download(file, folder, console)
        say(console, f"{path}: {path.stat().st_size / 1e6:,.1f} MB")
        stage = next((stage for start, stage in _STAGES.items() if path.name.startswith(start)), None)
        if stage is not None:
            say(console, f"next: python train/{stage}.py --data {path}")
    return 0


def fetch_for_stages(stages: Sequence[str], folder: Path, hubs: Sequence[HubName], console: Console) -> dict[str, Path]:
    """Upstream's file for each of `stages`, in `folder`. A file that is there is complete; others are downloaded from
    the first of `hubs` that has them. Raises ValueError, in one line, as the last hub does."""
    paths: dict[str, Path] = {}
    for stage in stages:
        there = [path for name in FOR_STAGES[stage] if (path := folder / f"{name}.jsonl").exists()]
        paths[stage] = there[0] if there else _fetch_one(stage, folder, hubs, console)
    return paths


def _fetch_one(stage: str, folder: Path, hubs: Sequence[HubName], console: Console) -> Path:
    for hub in hubs:
        try:
            files = list_files(hub, UPSTREAM[hub])
            names = [name for name in FOR_STAGES[stage] if f"{name}.jsonl" in files] or FOR_STAGES[stage]
            file = _choose(names[0], files, hub, UPSTREAM[hub])
            say(console, f"downloading {file.name},{_megabytes(file.size)}, from {hub} into {folder}")
            return download(file, folder, console)
        except ValueError:
            if hub == hubs[-1]:
                raise
    raise ValueError(
        f"{folder / FOR_STAGES[stage][0]}.jsonl is not there: run `minimind data download {FOR_STAGES[stage][0]}`"
    )


def download(file: RemoteFile, folder: Path, console: Console) -> Path:
    """Download `file` into `folder` and check it; a complete file is not downloaded again.

    Raises ValueError, in one line, if the server stops answering, a size or checksum is wrong, the disk is full, or a
    file of that name has other content. A partial download is kept for the next attempt unless its content is wrong.
    """
    with _plain_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    final = folder / Path(file.name).name
    # the name depends on the content, so that a partial download of an older version is not resumed
    version = file.sha256[:12] if file.sha256 else str(file.size)
    partial = final.with_name(f"{final.name}.{version}.part")
    lock = final.with_name(f".{final.name}.lock")
    with _plain_errors(folder), locked(lock, f"fetching {final.name}", console):
        if final.exists():
            _check(final, file, "the existing file has other content; remove it, or name another --out")
            say(console, f"{final}: already downloaded")
            return final
        _fetch(file, partial, console)
        try:
            _check(partial, file, "the download was damaged and has been removed; run the same command again")
        except ValueError:
            partial.unlink()
            raise
        sync(partial)
        os.replace(partial, final)
        sync(folder)
    if file.sha256 is None:
        say(console, f"{final}: the hub has no checksum; only the size was checked")
    return final


def _fetch(file: RemoteFile, partial: Path, console: Console) -> None:
    """Download until `partial` is complete, reconnecting when the connection breaks."""
    if file.size is not None and _size(partial) > file.size:
        partial.unlink()
    done = _size(partial)
    missing = (file.size or done) - done
    if missing > shutil.disk_usage(partial.parent).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    idle, why = 0, "it sends no more data"
    with ByteProgress(console, file.name, file.size, done) as progress:
        while file.size is None or done < file.size:
            try:
                complete = _receive(file, partial, done, progress)
                if complete and file.size is None:
                    return
            except BROKEN as error:
                if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                    raise ValueError(f"{file.name}: HTTP {error.code} from {_host(file)}") from None
                why = str(getattr(error, "reason", None) or error)
            before, done = done, _size(partial)
            idle = 0 if done > before else idle + 1
            if idle == ATTEMPTS:
                raise ValueError(
                    f"{file.name}: {_host(file)} broke off at {done:,} bytes ({why}); run the same command again to "
                    "resume"
                )
            time.sleep(PAUSE * idle)


def _receive(file: RemoteFile, partial: Path, done: int, progress: ByteProgress) -> bool:
    """Append the data after the first `done` bytes. Returns whether the response was complete."""
    with open_url(file.url, {"Range": f"bytes={done}-"} if done else None) as response:
        resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {done}-")
        if response.status == 206 and not resumed:
            raise HTTPException("the server sent a range that was not requested")
        done = done if resumed else 0  # otherwise the server sends the whole file
        left = response.headers.get("Content-Length")
        end = None if left is None else done + int(left)
        with partial.open("ab" if resumed else "wb") as out:
            while chunk := response.read(CHUNK):
                out.write(chunk)
                done += len(chunk)
                progress.update(done)
    return end is None or done == end


def _check(path: Path, file: RemoteFile, way_out: str) -> None:
    if file.size is not None and _size(path) != file.size:
        raise ValueError(f"{path}: {_size(path):,} bytes, the hub says {file.size:,}; {way_out}")
    if file.sha256 is not None:
        digest = _sha256(path)
        if digest != file.sha256.lower():
            raise ValueError(f"{path}: SHA-256 {digest[:12]}..., the hub says {file.sha256[:12]}...; {way_out}")


def _choose(name: str, files: dict[str, RemoteFile], hub: HubName, repo: str) -> RemoteFile:
    for candidate in (name, f"{name}.jsonl"):
        if candidate in files:
            return files[candidate]
    raise ValueError(f"{name}: {repo} on {hub} has no such file; it has {', '.join(sorted(files))}")


@contextmanager
def _plain_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise ValueError(f"{folder}: the disk or quota is full; free some space, or name another --out") from None
        raise ValueError(f"{error.filename or folder}: cannot be written ({error.strerror or error})") from None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _host(file: RemoteFile) -> str:
    return urlsplit(file.url).netloc


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:>10,.1f} MB"
