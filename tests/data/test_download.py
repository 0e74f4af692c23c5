"""Downloads from a hub made with Python's HTTP server: interrupted, resumed, damaged, refused."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from rich.console import Console

from minimind import cli
from minimind.data import download
from minimind.data.download import fetch_for_stages, list_files
from minimind.data.paths import expand_paths
from minimind.data.reader import iter_texts

ROWS = b"".join(json.dumps({"text": f"row {i}, " + "x" * (i % 90)}).encode() + b"\n" for i in range(5000))
FILES = {"pretrain_hq.jsonl": ROWS, "dpo.jsonl": ROWS[:1000], "README.md": b"# data\n"}


class Hub:
    """A server that speaks both hubs' APIs. cut: the bytes after which each of the next answers breaks off. ranges: the
    ranges that were requested. ignore_range: answer with the whole file. lie: report a wrong SHA-256. no_sums: report
    none. short: the number of bytes by which reported sizes are too small."""

    def __init__(self) -> None:
        self.cut: list[int] = []
        self.ranges: list[str | None] = []
        self.status: list[int] = []
        self.short = 0
        self.ignore_range = self.lie = self.no_sums = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"

    def sum(self, name: str) -> str | None:
        digest = hashlib.sha256(FILES[name]).hexdigest()
        return None if self.no_sums else ("0" * 64 if self.lie else digest)

    def answer(self, http: BaseHTTPRequestHandler) -> None:
        url = urlsplit(http.path)
        query = parse_qs(url.query)
        if url.path == "/api/v1/datasets/gongjy/minimind_dataset/repo/tree":
            files: list[dict[str, Any]] = [{"Type": "tree", "Path": "images"}]
            files += [
                {"Type": "blob", "Path": n, "Size": len(b) - self.short, "Sha256": self.sum(n)}
                for n, b in FILES.items()
            ]
            return self.send_json(http, {"Data": {"Files": files}})
        if url.path == "/api/datasets/jingyaogong/minimind_dataset/tree/main":
            entries: list[dict[str, Any]] = [{"type": "directory", "path": "images"}]
            for name, body in FILES.items():
                large = {"oid": self.sum(name), "size": len(body)} if name.endswith("l") else None
                entries.append({"type": "file", "path": name, "size": 130, **({"lfs": large} if large else {})})
            return self.send_json(http, entries)
        found = query.get("FilePath") or re.findall(r"/resolve/main/(.+)", url.path)
        if not found or found[0] not in FILES:
            return http.send_error(404)
        self.send_file(http, FILES[found[0]])

    def send_json(self, http: BaseHTTPRequestHandler, value: Any) -> None:
        body = json.dumps(value).encode()
        http.send_response(200)
        http.send_header("Content-Length", str(len(body)))
        http.end_headers()
        http.wfile.write(body)

    def send_file(self, http: BaseHTTPRequestHandler, body: bytes) -> None:
        asked = http.headers.get("Range")
        self.ranges.append(asked)
        if self.status:
            return http.send_error(self.status.pop(0))
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and not self.ignore_range else 0
        http.send_response(206 if start else 200)
        if start:
            http.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        http.send_header("Content-Length", str(len(body) - start))
        http.end_headers()
        if self.cut:
            http.wfile.write(body[start : start + self.cut.pop(0)])
            http.close_connection = True
            return
        http.wfile.write(body[start:])


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    monkeypatch.setattr(download, "PAUSE", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield hub
    hub.server.shutdown()
    thread.join()
    hub.server.server_close()


def fetch(hub: Hub, out: Path, *names: str, name: str = "modelscope") -> int:
    return cli.run(["data", "download", *names, "--hub", name, "--endpoint", hub.address, "--out", str(out)])


def error_of(capsys) -> str:
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    return said


def left(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))


@pytest.mark.parametrize("name", ["modelscope", "huggingface"])
def test_files_are_downloaded_completely(name, hub, tmp_path, capsys):
    out = tmp_path / "dataset"
    assert fetch(hub, out, "pretrain_hq", "dpo.jsonl", "dpo", name=name) == 0
    assert left(out) == ["dpo.jsonl", "pretrain_hq.jsonl"]
    assert all((out / file).read_bytes() == FILES[file] for file in left(out))
    lines = capsys.readouterr().out.splitlines()
    assert f"next: python train/pretrain.py --data {out / 'pretrain_hq.jsonl'}" in lines
    assert f"next: python train/dpo.py --data {out / 'dpo.jsonl'}" in lines
    assert sum(1 for _ in iter_texts(out / "pretrain_hq.jsonl")) == 5000
    asked = len(hub.ranges)
    assert fetch(hub, out, "dpo", name=name) == 0 and len(hub.ranges) == asked, "not fetched again"
    assert "already downloaded" in capsys.readouterr().out


def test_files_are_listed(hub, tmp_path, capsys):
    assert fetch(hub, tmp_path) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(FILES)
    found = list_files("huggingface", "jingyaogong/minimind_dataset", hub.address)
    assert found["pretrain_hq.jsonl"].size == len(ROWS), "the size of the content, not of the pointer to it"
    assert found["README.md"].sha256 is None


def test_files_for_stages_come_from_the_first_hub_that_has_them(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    hubs = ["modelscope", "huggingface"]

    def silent(repo: str, endpoint: str) -> dict:
        raise ValueError("modelscope does not answer (no route)")

    monkeypatch.setattr(download, "_modelscope", silent)
    shown = io.StringIO()
    found = fetch_for_stages(["pretrain", "dpo"], tmp_path, hubs, Console(file=shown, width=200))
    assert found == {"pretrain": tmp_path / "pretrain_hq.jsonl", "dpo": tmp_path / "dpo.jsonl"}
    assert (tmp_path / "pretrain_hq.jsonl").read_bytes() == ROWS
    assert "downloading pretrain_hq.jsonl," in shown.getvalue() and "from huggingface into" in shown.getvalue()
    asked = len(hub.ranges)
    quiet = Console(quiet=True)
    assert fetch_for_stages(["dpo"], tmp_path, hubs, quiet) == {"dpo": tmp_path / "dpo.jsonl"}
    assert len(hub.ranges) == asked, "what is there is not asked for"
    with pytest.raises(ValueError, match="sft_mini_512: jingyaogong/minimind_dataset on huggingface has no such file"):
        fetch_for_stages(["sft"], tmp_path, hubs, quiet)
    monkeypatch.setitem(FILES, "sft_t2t_mini.jsonl", ROWS[:2000])
    assert fetch_for_stages(["sft"], tmp_path, hubs, quiet) == {"sft": tmp_path / "sft_t2t_mini.jsonl"}
    with pytest.raises(ValueError, match="modelscope does not answer"):
        fetch_for_stages(["reason"], tmp_path, hubs[:1], quiet)


def test_a_broken_connection_is_resumed(hub, tmp_path):
    hub.cut = [100_000, 50_000]
    assert fetch(hub, tmp_path, "pretrain_hq") == 0
    assert hub.ranges == [None, "bytes=100000-", "bytes=150000-"]
    assert (tmp_path / "pretrain_hq.jsonl").read_bytes() == ROWS


def test_a_later_command_resumes(hub, tmp_path, capsys):
    hub.cut = [100_000] + [0] * download.ATTEMPTS
    assert fetch(hub, tmp_path, "pretrain_hq") == 2
    error = error_of(capsys)
    assert "broke off at 100,000 bytes" in error and "run the same command again to resume" in error
    (partial,) = left(tmp_path)
    assert partial.endswith(".part") and (tmp_path / partial).read_bytes() == ROWS[:100_000]
    hub.ranges.clear()
    assert fetch(hub, tmp_path, "pretrain_hq") == 0
    assert hub.ranges == ["bytes=100000-"] and left(tmp_path) == ["pretrain_hq.jsonl"]
    assert (tmp_path / "pretrain_hq.jsonl").read_bytes() == ROWS


def test_a_server_that_ignores_the_range_restarts_the_file(hub, tmp_path):
    hub.cut, hub.ignore_range = [100_000], True
    assert fetch(hub, tmp_path, "pretrain_hq") == 0
    assert (tmp_path / "pretrain_hq.jsonl").read_bytes() == ROWS


def test_a_temporary_server_error_is_retried(hub, tmp_path):
    hub.status = [503, 500]
    assert fetch(hub, tmp_path, "dpo") == 0 and left(tmp_path) == ["dpo.jsonl"]


def test_a_wrong_checksum_is_refused(hub, tmp_path, capsys):
    hub.lie = True
    assert fetch(hub, tmp_path, "dpo") == 2
    error = error_of(capsys)
    assert "SHA-256" in error and "the hub says 000000000000" in error and "damaged" in error
    assert left(tmp_path) == []


@pytest.mark.parametrize("ignore_range", [False, True])
def test_a_file_longer_than_announced_is_refused(ignore_range, hub, tmp_path, capsys):
    hub.short, hub.ignore_range, hub.cut = 100, ignore_range, [500]
    assert fetch(hub, tmp_path, "dpo") == 2
    assert "1,000 bytes, the hub says 900; the download was damaged" in error_of(capsys)
    assert left(tmp_path) == []


def test_a_damaged_partial_download_is_detected(hub, tmp_path, capsys):
    mark = hashlib.sha256(ROWS).hexdigest()[:12]
    (tmp_path / f"pretrain_hq.jsonl.{mark}.part").write_bytes(b"#" * 1000)
    assert fetch(hub, tmp_path, "pretrain_hq") == 2 and "damaged" in error_of(capsys)
    assert left(tmp_path) == [] and fetch(hub, tmp_path, "pretrain_hq") == 0
    (tmp_path / "dpo.jsonl.0.part").write_bytes(b"another version's")
    assert fetch(hub, tmp_path, "dpo") == 0 and (tmp_path / "dpo.jsonl").read_bytes() == FILES["dpo.jsonl"]


def test_a_partial_download_longer_than_the_file_is_dropped(hub, tmp_path):
    mark = hashlib.sha256(FILES["dpo.jsonl"]).hexdigest()[:12]
    (tmp_path / f"dpo.jsonl.{mark}.part").write_bytes(b"#" * 5000)
    assert fetch(hub, tmp_path, "dpo") == 0 and (tmp_path / "dpo.jsonl").read_bytes() == FILES["dpo.jsonl"]


def test_a_missing_checksum_is_reported(hub, tmp_path, capsys):
    hub.no_sums = True
    assert fetch(hub, tmp_path, "dpo") == 0
    assert "has no checksum; only the size was checked" in capsys.readouterr().out


def test_other_content_is_not_overwritten(hub, tmp_path, capsys):
    (tmp_path / "dpo.jsonl").write_bytes(b"mine")
    assert fetch(hub, tmp_path, "dpo") == 2
    assert "the existing file has other content; remove it, or name another --out" in error_of(capsys)
    assert (tmp_path / "dpo.jsonl").read_bytes() == b"mine"


def test_unknown_names(hub, tmp_path, capsys, monkeypatch):
    assert fetch(hub, tmp_path / "x", "sft_9") == 2
    assert "sft_9: gongjy/minimind_dataset on modelscope has no such file; it has README.md, dpo.jsonl" in error_of(
        capsys
    )
    monkeypatch.setattr(hub, "status", [404])
    assert fetch(hub, tmp_path, "dpo") == 2
    assert "dpo.jsonl: HTTP 404 from 127.0.0.1" in error_of(capsys)
    address = ["--endpoint", hub.address, "--repo", "gongjy/nothing"]
    assert cli.run(["data", "download", *address]) == 2
    assert "modelscope: there is no public data set gongjy/nothing (HTTP 404)" in error_of(capsys)


def test_no_network_is_one_line(tmp_path, capsys):
    assert cli.run(["data", "download", "dpo", "--endpoint", "http://127.0.0.1:9", "--out", str(tmp_path)]) == 2
    assert "modelscope does not answer" in error_of(capsys)


def test_a_full_disk_and_a_closed_folder(hub, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    assert fetch(hub, tmp_path / "file", "dpo") == 2 and "cannot be written" in error_of(capsys)

    class Full:
        free = 10

    with monkeypatch.context() as patch:
        patch.setattr(download.shutil, "disk_usage", lambda _: Full)
        assert fetch(hub, tmp_path, "dpo") == 2
        assert f"{tmp_path}: the disk or quota is full; free some space" in error_of(capsys)
    for number, words in ((errno.ENOSPC, "the disk or quota is full"), (errno.EACCES, "cannot be written (")):

        def fails(*_: Any, number: int = number) -> bool:
            raise OSError(number, "no")

        with monkeypatch.context() as patch:
            patch.setattr(download, "_receive", fails)
            assert fetch(hub, tmp_path, "dpo") == 2 and words in error_of(capsys)


def test_the_trainers_read_the_folder(hub, tmp_path):
    """Partial downloads and lock files in the folder are ignored."""
    hub.cut = [100_000] + [0] * download.ATTEMPTS
    assert fetch(hub, tmp_path, "pretrain_hq") == 2 and fetch(hub, tmp_path, "dpo") == 0
    assert [path.name for path in expand_paths([tmp_path])] == ["dpo.jsonl"]
