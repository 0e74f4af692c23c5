import errno
import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import zstandard
from rich.console import Console

from minimind.data import build as build_module
from minimind.data import open_corpus, read_documents
from tests.data.fake import QUIET, ByteTokenizer, some_texts, text_of, write_jsonl

ROOT = Path(__file__).parents[2]
TEXTS = some_texts(300)
# A build in its own process: file, cache, seconds to sleep per batch.
CHILD = """
import sys, time
from minimind.data import build, open_corpus
from tests.data.fake import ByteTokenizer
class Slow(ByteTokenizer):
    def encode_batch(self, *args, **kwargs):
        time.sleep(float(sys.argv[3]))
        return super().encode_batch(*args, **kwargs)
build.BATCH_BYTES = 500
build.build.__defaults__ = (build.PART_BYTES, 500)
print(open_corpus([sys.argv[1]], Slow(), sys.argv[2], part_bytes=1000).num_tokens)
"""


class Counting(ByteTokenizer):
    """Counts the texts that it encodes; raises at text number `fail_at`."""

    def __init__(self, fail_at: int = -1) -> None:
        self.texts, self.fail_at = 0, fail_at

    def encode_batch(self, texts, allow_special=True):
        self.texts += len(texts)
        if 0 <= self.fail_at < self.texts:
            raise KeyboardInterrupt
        return super().encode_batch(texts, allow_special)


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(build_module.build, "__defaults__", (build_module.PART_BYTES, 500))


@pytest.fixture
def path(tmp_path):
    return write_jsonl(tmp_path / "a.jsonl", TEXTS)


def contents(cache: Path) -> dict[str, bytes]:
    """The finished files, without the path-dependent memo and the locks."""
    return {f"{f.parent.name}/{f.name}": f.read_bytes() for f in sorted(cache.glob("tokens/*/*"))}


def start(path: Path, cache: Path, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", CHILD, str(path), str(cache), str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, stdout=-1, stderr=-1, text=True)


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


def listening() -> Console:
    return Console(file=io.StringIO(), record=True, force_terminal=False, width=60)


def test_a_file_is_tokenized_once(path, tmp_path):
    tokenizer = Counting()
    for _ in range(3):
        open_corpus([path], tokenizer, tmp_path / "cache", console=QUIET)
    (tmp_path / "copy").mkdir()
    copy = write_jsonl(tmp_path / "copy" / "b.jsonl", TEXTS)
    assert open_corpus([path, copy], tokenizer, tmp_path / "cache", console=QUIET).num_documents == 600
    assert tokenizer.texts == 300
    tokenizer.fingerprint = "other"
    open_corpus([path], tokenizer, tmp_path / "cache", console=QUIET)
    assert tokenizer.texts == 600
    write_jsonl(path, [*TEXTS[:-1], "x"])
    assert text_of(open_corpus([path], tokenizer, tmp_path / "cache", console=QUIET).document(299)) == "x"


def test_a_settled_file_is_hashed_once_and_a_changed_one_again(path, tmp_path, monkeypatch):
    monkeypatch.setattr("minimind.data.cache._SETTLED_NS", -1)
    open_corpus([path], ByteTokenizer(), tmp_path / "cache", console=QUIET)
    with monkeypatch.context() as patched:
        patched.setattr("minimind.data.cache._HASH_CHUNK", "not read")
        open_corpus([path], ByteTokenizer(), tmp_path / "cache", console=QUIET)
    info = path.stat()
    write_jsonl(path, ["y" + text[1:] for text in TEXTS])
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))  # same size, same time of change
    assert path.stat().st_size == info.st_size
    corpus = open_corpus([path], ByteTokenizer(), tmp_path / "cache", console=QUIET)
    assert text_of(corpus.document(0)).startswith("y")


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_compressed_files_equal_plain_ones(tmp_path, kind):
    data = b"".join(b'{"text": "%s"}\n' % text.encode() for text in TEXTS) * 20
    plain, gz, zst = (tmp_path / f"a.{kind}{packing}" for packing in ("", ".gz", ".zst"))
    plain.write_bytes(data)
    gz.write_bytes(gzip.compress(data))
    zst.write_bytes(zstandard.ZstdCompressor().compress(data))
    cache = tmp_path / "cache"
    corpora = [open_corpus([p], ByteTokenizer(), cache, part_bytes=9000, console=QUIET) for p in (plain, gz, zst)]
    for other in corpora[1:]:
        assert (other.sources[0].tokens == corpora[0].sources[0].tokens).all()
        assert (other.sources[0].index == corpora[0].sources[0].index).all()


@pytest.mark.parametrize("ending", ["jsonl", "txt.gz"])
@pytest.mark.parametrize("fail_at", [0, 0.4, 0.99])
def test_an_interrupted_build_resumes(tmp_path, ending, fail_at):
    path = tmp_path / f"a.{ending}"
    rows = [json.dumps({"text": text}) if i % 7 else "bad" for i, text in enumerate(TEXTS)]
    data = "\n".join(rows).encode() * (1 if ending == "jsonl" else 20)
    path.write_bytes(data if ending == "jsonl" else gzip.compress(data))
    fail_at = max(1, int(fail_at * len(list(read_documents(path, "skip")))))
    part = 1000 if ending == "jsonl" else 8_000  # each is written to the disk: some dozens of them
    options: dict[str, Any] = {"on_bad_row": "skip", "part_bytes": part, "console": QUIET}
    open_corpus([path], ByteTokenizer(), tmp_path / "whole", **options)
    cut, rest = Counting(fail_at), Counting()
    with pytest.raises(KeyboardInterrupt):
        open_corpus([path], cut, tmp_path / "cut", **options)
    for file in (tmp_path / "cut").glob("tokens/*/*.bin"):
        with open(file, "ab") as torn:
            torn.write(b"half a part" * 100_000)
    corpus = open_corpus([path], rest, tmp_path / "cut", **options)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert rest.texts <= corpus.num_documents - max(0, fail_at - 60)


def test_a_killed_build_resumes(path, tmp_path):
    with start(path, tmp_path / "cut", 0.05) as child:
        wait_for(lambda: list((tmp_path / "cut").glob("tokens/*/progress.json")))
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    assert not list((tmp_path / "cut").glob("tokens/*/meta.json"))
    tokenizer = Counting()
    open_corpus([path], tokenizer, tmp_path / "cut", part_bytes=1000, console=QUIET)
    assert 0 < tokenizer.texts < 300
    open_corpus([path], ByteTokenizer(), tmp_path / "whole", console=QUIET)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_two_processes_at_once_build_once(path, tmp_path):
    first = start(path, tmp_path / "cache", 0.002)
    wait_for(lambda: list((tmp_path / "cache").glob("tokens/*/tokens.bin")))
    first.send_signal(signal.SIGSTOP)  # not done before the second has begun, however busy the machine is
    second = start(path, tmp_path / "cache", 0.002)
    assert second.stderr.readline() == "waiting for another process that is tokenizing a.jsonl\n"
    first.send_signal(signal.SIGCONT)
    (out, said), (other_out, other_said) = first.communicate(timeout=60), second.communicate(timeout=60)
    assert out == other_out and first.returncode == second.returncode == 0
    assert "tokenized a.jsonl: 300 documents" in said and other_said == ""
    open_corpus([path], ByteTokenizer(), tmp_path / "whole", console=QUIET)
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_files_are_rebuilt(path, tmp_path, name, damage):
    before = open_corpus([path], ByteTokenizer(), tmp_path / "cache", console=QUIET)
    whole = contents(tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob(f"tokens/*/{name}")
    os.replace(file, tmp_path / "moved")  # what is mapped stays as it was
    if damage == "cut":
        file.write_bytes((tmp_path / "moved").read_bytes()[:-16])
    console, tokenizer = listening(), Counting()
    open_corpus([path], tokenizer, tmp_path / "cache", console=console)
    assert tokenizer.texts == 300 and contents(tmp_path / "cache") == whole
    if name != "meta.json":
        assert "damaged; tokenizing the file again" in console.export_text()
    assert text_of(before.document(299)) == TEXTS[299]


def bad_file(tmp_path: Path) -> Path:
    path = write_jsonl(tmp_path / "bad.jsonl", TEXTS)
    lines = path.read_text().split("\n")
    path.write_text("\n".join([*lines[:200], '{"text": 1}', *lines[200:250], "x", *lines[250:]]))
    return path


def test_bad_rows(tmp_path):
    path, cache = bad_file(tmp_path), tmp_path / "cache"
    message = f'{path}:201: field "text" is a number, not a string; fix the row or pass --on-bad-row skip'

    def fails():
        with pytest.raises(ValueError) as caught:
            open_corpus([path], ByteTokenizer(), cache, part_bytes=1000, console=QUIET)
        assert str(caught.value) == message

    fails()
    for _ in range(2):
        console, tokenizer = listening(), Counting()
        corpus = open_corpus([path], tokenizer, cache, "skip", console, part_bytes=1000)
        assert corpus.num_documents == 300 and corpus.sources[0].meta["bad"]["count"] == 2
        said = console.export_text()
        assert f"{path}: 2 bad rows left out, the first at {path}:201: field" in said
        fails()
    assert tokenizer.texts == 0


def test_bad_rows_of_an_unfinished_build(tmp_path):
    path, cache = bad_file(tmp_path), tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        open_corpus([path], Counting(280), cache, "skip", QUIET, part_bytes=1000)
    with pytest.raises(ValueError, match=re.escape(f"{path}:201: ")):
        open_corpus([path], ByteTokenizer(), cache, part_bytes=1000, console=QUIET)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty.jsonl: no document in this file; give a file with text in it"),
        (b"\n \n", "empty.jsonl: no document in this file; give a file with text in it"),
        (b"x\n[]\n", "empty.jsonl: no document in this file, as all 2 rows are bad (line 1: malformed JSON"),
    ],
)
def test_files_without_documents(tmp_path, data, message):
    path = tmp_path / "empty.jsonl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(message)):
        open_corpus([path], ByteTokenizer(), tmp_path / "cache", "skip", QUIET)


def test_a_vocabulary_beyond_16_bits(path, tmp_path):
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = 65537
    with pytest.raises(ValueError, match="has 65537 tokens, but the token cache stores 16-bit"):
        open_corpus([path], tokenizer, tmp_path / "cache", console=QUIET)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["_write", "os.fsync", "write_json"])
def test_a_full_disk(path, tmp_path, monkeypatch, code, call):
    calls = 0

    def full(*args):
        nonlocal calls
        calls += 1
        if calls > 7:
            raise OSError(code, os.strerror(code))
        return original(*args)

    owner, name = (os, "fsync") if call == "os.fsync" else (build_module, call)
    original = getattr(owner, name)
    folder = re.escape(str(tmp_path / "cache" / "tokens"))
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, full)
        with pytest.raises(ValueError) as caught:
            open_corpus([path], ByteTokenizer(), tmp_path / "cache", part_bytes=1000, console=QUIET)
    message = rf"{folder}/\w+: the disk or quota is full, about [\d.]+ MB more are needed; free some space or "
    assert re.fullmatch(message + r"choose another folder with --cache-dir or \$MINIMIND_CACHE", str(caught.value))
    assert not list((tmp_path / "cache").glob("tokens/*/meta.json"))
    assert not list((tmp_path / "cache").glob("tokens/*/.*"))
    progress = json.loads(next((tmp_path / "cache").glob("tokens/*/progress.json")).read_text())
    (tokens,) = (tmp_path / "cache").glob("tokens/*/tokens.bin")
    assert tokens.stat().st_size == 2 * progress["tokens"] > 0  # nothing beyond what counts
    tokenizer = Counting()
    open_corpus([path], tokenizer, tmp_path / "cache", console=QUIET)
    open_corpus([path], ByteTokenizer(), tmp_path / "whole", console=QUIET)
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole") and tokenizer.texts < 300


def test_a_folder_that_cannot_be_written(path, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"cannot write here \(Not a directory\); choose another folder with --cache"):
        open_corpus([path], ByteTokenizer(), tmp_path / "file", console=QUIET)


def test_a_finished_cache_needs_no_writing(path, tmp_path, monkeypatch):
    open_corpus([path], ByteTokenizer(), tmp_path / "cache", console=QUIET)
    monkeypatch.setattr("minimind.utils.files.os.access", lambda *_: False)
    monkeypatch.setattr("minimind.data.cache._SETTLED_NS", -1)
    assert open_corpus([path], ByteTokenizer(), tmp_path / "cache", console=QUIET).num_documents == 300
    write_jsonl(path, TEXTS[:5])
    with pytest.raises(ValueError, match=r"cannot write here \(Permission denied\)"):
        open_corpus([path], ByteTokenizer(), tmp_path / "cache", console=QUIET)


def test_a_file_that_changes_while_it_is_tokenized(path, tmp_path):
    class Changing(ByteTokenizer):
        def encode_batch(self, texts, allow_special=True):
            with open(path, "a") as file:
                file.write('{"text": "more"}\n')
            return super().encode_batch(texts, allow_special)

    with pytest.raises(ValueError, match="changed while it was being tokenized; run again"):
        open_corpus([path], Changing(), tmp_path / "cache", console=QUIET)
    assert not list((tmp_path / "cache").glob("tokens/*/meta.json"))


def test_the_environment_sets_the_cache_folder(path, tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "here"))
    open_corpus([path], ByteTokenizer(), console=QUIET)
    assert contents(tmp_path / "here")


def test_a_missing_home_is_an_error(path, monkeypatch):
    """For example in a container whose user the system does not know."""
    monkeypatch.delenv("MINIMIND_CACHE", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(ValueError, match=r"~/\.cache/minimind: there is no such home folder; choose .*--cache-dir"):
        open_corpus([path], ByteTokenizer(), console=QUIET)


def test_progress_without_a_terminal(path, tmp_path, monkeypatch):
    monkeypatch.setattr("minimind.utils.display._LINE_SECONDS", 0.0)
    console = listening()
    open_corpus([path], ByteTokenizer(), tmp_path / "cache", console=console)
    lines = console.export_text().splitlines()
    assert sum(bool(re.fullmatch(r"tokenizing a.jsonl: .* of .* MB, .* MB/s, \d+ s left", s)) for s in lines) > 5
    terminal = Console(file=io.StringIO(), force_terminal=True)
    open_corpus([path], ByteTokenizer(), tmp_path / "other", console=terminal)


MEMORY = """
import sys
from pathlib import Path
from minimind.data import open_corpus, PackedLoader
from tests.data.fake import ByteTokenizer, QUIET
corpus = open_corpus([sys.argv[1]], ByteTokenizer(), sys.argv[2], console=QUIET, part_bytes=1 << 20)
lines = Path("/proc/self/status").read_text().splitlines()  # not ru_maxrss, which begins at what pytest itself held
print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads a process' memory from /proc")
def test_memory_does_not_grow_with_the_file(tmp_path):
    def peak(name: str, times: int) -> float:
        path = tmp_path / f"{name}.jsonl"
        with open(path, "w") as file:
            for i in range(times):
                file.write(json.dumps({"text": f"{i} " + "text " * 200}) + "\n")
        command = [sys.executable, "-c", MEMORY, str(path), str(tmp_path / "cache")]
        return float(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)

    small, large = peak("small", 5_000), peak("large", 50_000)  # 5 and 50 MB of text, 10 and 100 MB of tokens
    assert large < small + 8
