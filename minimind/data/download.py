"""Fetch upstream MiniMind's data sets: `minimind data download pretrain_hq sft_mini_512`.

    minimind data download                          what there is
    minimind data download sft_512 dpo --hub huggingface --out dataset
    minimind data download x --repo owner/name      of another data set repository

A download that was cut off goes on where it stopped; a file gets its name when its size and its SHA-256 are the hub's.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import ssl
import time
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import tyro
from rich.console import Console

from minimind.data.hubs import HubName, RemoteFile, list_files, open_url
from minimind.utils.files import is_disk_full, locked, sync
from minimind.utils.progress import ByteProgress, say

CHUNK = 1 << 20
ATTEMPTS = 5  # in a row that bring not one byte
PAUSE = 1.0  # seconds after the first such attempt, twice as long after the second, and on
BROKEN = (HTTPException, ConnectionError, TimeoutError, ssl.SSLError, urllib.error.URLError)
_STAGES = {"pretrain": "pretrain", "sft": "sft", "dpo": "dpo", "r1_": "reason", "lora": "lora", "rlaif": "grpo"}


@dataclass(frozen=True)
class Args:
    """Fetch data sets."""

    action: Annotated[Literal["download"], tyro.conf.Positional]
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Files, with or without .jsonl: pretrain_hq, sft_mini_512, sft_512, sft_1024, sft_2048, dpo, r1_mix_1024,
    lora_identity, lora_medical, rlaif-mini, ... None: list what there is."""
    hub: HubName = "modelscope"
    """modelscope or huggingface; the first is near in China."""
    repo: str = "gongjy/minimind_dataset"
    """The data set repository, owner/name."""
    endpoint: str | None = None
    """Another address of the hub, such as a mirror's. None: its own, or $HF_ENDPOINT."""
    out: str = "dataset"
    """The folder to put the files in."""


def main(args: Args) -> int:
    console = Console()
    files = list_files(args.hub, args.repo, args.endpoint)
    if not args.names:
        for file in files.values():
            say(console, f"{file.name:<32} {_megabytes(file.size)}")
        return 0
    wanted = [_choose(name, files, args) for name in dict.fromkeys(args.names)]
    folder = Path(args.out).expanduser()
    for file in wanted:
        path = download(file, folder, console)
        say(console, f"{path}: {path.stat().st_size / 1e6:,.1f} MB")
        stage = next((stage for start, stage in _STAGES.items() if path.name.startswith(start)), None)
        if stage is not None:
            say(console, f"next: python train/{stage}.py --data {path}")
    return 0


def download(file: RemoteFile, folder: Path, console: Console) -> Path:
    """Fetch `file` into `folder` and check it; what lies there whole is not fetched again.

    ValueError, one line, for a server that stops answering, a wrong size or checksum, a full disk, or a file of the
    name with other content. What was fetched stays for the next attempt, unless its content is wrong.
    """
    with _plain_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    final = folder / Path(file.name).name
    # named after its content: what is left of an older version is not gone on with
    mark = file.sha256[:12] if file.sha256 else str(file.size)
    partial = final.with_name(f"{final.name}.{mark}.part")
    lock = final.with_name(f".{final.name}.lock")
    with _plain_errors(folder), locked(lock, f"fetching {final.name}", console):
        if final.exists():
            _check(final, file, "it was there with other content; remove it, or name another --out")
            say(console, f"{final}: there already")
            return final
        _fetch(file, partial, console)
        try:
            _check(partial, file, "the download was damaged and is removed; run the same command again")
        except ValueError:
            partial.unlink()
            raise
        sync(partial)
        os.replace(partial, final)
        sync(folder)
    if file.sha256 is None:
        say(console, f"{final}: the hub tells no checksum, its size alone was checked")
    return final


def _fetch(file: RemoteFile, partial: Path, console: Console) -> None:
    """Bring `partial` to its full length; a connection that breaks is taken up again."""
    if file.size is not None and _size(partial) > file.size:
        partial.unlink()
    done = _size(partial)
    missing = (file.size or done) - done
    if missing > shutil.disk_usage(partial.parent).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    idle, why = 0, "it sends nothing more"
    with ByteProgress(console, file.name, file.size, done) as progress:
        while file.size is None or done < file.size:
            try:
                whole = _receive(file, partial, done, progress)
                if whole and file.size is None:
                    return
            except BROKEN as error:
                if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                    raise ValueError(f"{file.name}: HTTP {error.code} from {_host(file)}") from None
                why = str(getattr(error, "reason", None) or error)
            before, done = done, _size(partial)
            idle = 0 if done > before else idle + 1
            if idle == ATTEMPTS:
                raise ValueError(
                    f"{file.name}: {_host(file)} broke off at {done:,} bytes ({why}); run the same command again to go "
                    "on there"
                )
            time.sleep(PAUSE * idle)


def _receive(file: RemoteFile, partial: Path, done: int, progress: ByteProgress) -> bool:
    """Append what the server sends after the first `done` bytes; whether the answer came to its end."""
    with open_url(file.url, {"Range": f"bytes={done}-"} if done else None) as response:
        from_there = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {done}-")
        if response.status == 206 and not from_there:
            raise HTTPException("it sends another part than the one asked for")
        done = done if from_there else 0  # it begins at the beginning
        left = response.headers.get("Content-Length")
        end = None if left is None else done + int(left)
        with partial.open("ab" if from_there else "wb") as out:
            while chunk := response.read(CHUNK):
                out.write(chunk)
                done += len(chunk)
                progress.update(done)
    return end is None or done == end


def _check(path: Path, file: RemoteFile, otherwise: str) -> None:
    if file.size is not None and _size(path) != file.size:
        raise ValueError(f"{path}: {_size(path):,} bytes, the hub says {file.size:,}; {otherwise}")
    if file.sha256 is not None:
        found = _sha256(path)
        if found != file.sha256.lower():
            raise ValueError(f"{path}: SHA-256 {found[:12]}..., the hub says {file.sha256[:12]}...; {otherwise}")


def _choose(name: str, files: dict[str, RemoteFile], args: Args) -> RemoteFile:
    for found in (name, f"{name}.jsonl"):
        if found in files:
            return files[found]
    known = ", ".join(sorted(files))
    raise ValueError(f"{name}: {args.repo} on {args.hub} has no such file; it has {known}")


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
