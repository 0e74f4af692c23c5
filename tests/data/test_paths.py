"""Expanding folders, globs and links: the same rules for all, each file once, and reports of what is left out."""

import json
import os
import re
import runpy
from pathlib import Path

import pytest

from minimind.data import open_corpus
from minimind.data.paths import expand_paths, find_files
from minimind.utils.files import read_json, write_json
from tests.data.fake import QUIET, ByteTokenizer, text_of, write_jsonl
from tests.data.test_cache import listening

ROOT = Path(__file__).parents[2]


def test_paths_from_files_folders_and_globs(tmp_path):
    for name in ["b.jsonl", "a.txt", "c.txt.gz", "sub/d.jsonl.zst", "sub/notes.md", ".hidden/e.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")

    def names(*patterns):
        return [str(path.relative_to(tmp_path)) for path in expand_paths([tmp_path / p for p in patterns])]

    assert names(".") == ["a.txt", "b.jsonl", "c.txt.gz", "sub/d.jsonl.zst"]
    assert names("b.jsonl", ".", "*.txt") == ["b.jsonl", "a.txt", "c.txt.gz", "sub/d.jsonl.zst"]
    assert names("*") == ["a.txt", "b.jsonl", "c.txt.gz", "sub/d.jsonl.zst"]
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    assert names("a.txt", "link.txt") == ["a.txt"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("x.csv", "x.csv: unknown kind of file; expected one of .jsonl .jsonl.gz .jsonl.zst .txt"),
        ("*.csv", "*.csv: matches no data file, only other files such as"),
        ("none.txt", "none.txt: no such file, folder or match; check the path given"),
        ("no*", "no*: no such file, folder or match"),
        ("empty", "empty: no data file in this folder; expected one of"),
    ],
)
def test_paths_without_data(tmp_path, pattern, message):
    (tmp_path / "x.csv").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        expand_paths([tmp_path / pattern])
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no data given"):
        expand_paths([])
    with pytest.raises(ValueError, match="an empty name in the data"):
        expand_paths([""])


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """data/ with a file, a link to a folder outside it, and entries that are not read."""
    monkeypatch.chdir(tmp_path)
    for name in ("data/a.jsonl", "ext/b.jsonl", "ext/deep/c.txt", "data/.git/d.txt", "data/notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "data/linked").symlink_to("../ext")
    (tmp_path / "data/gone.txt").symlink_to("nowhere")
    return tmp_path


EVERY = ["data/a.jsonl", "data/linked/b.jsonl", "data/linked/deep/c.txt"]


@pytest.mark.parametrize("pattern", ["data", "data/", "./data", "data/**", "data/*", "data/../data/**", "dat?/**/*"])
def test_a_folder_and_a_glob_agree_and_follow_links(tree, pattern):
    found = find_files([pattern])
    assert [os.path.normpath(path) for path in found.files.values()] == EVERY
    left_out = {kind: list(map(os.path.normpath, paths)) for kind, paths in found.left_out.items()}
    assert left_out.pop("hidden", None) == (["data/.git"] if pattern != "data/*" else None)
    assert left_out == {"of another kind": ["data/notes.md"], "unreadable": ["data/gone.txt"]} and not found.twice


def test_a_link_to_the_folder_itself(tree):
    (tree / "other").symlink_to("data")
    assert [str(path) for path in expand_paths(["other"])] == [name.replace("data", "other", 1) for name in EVERY]


@pytest.mark.parametrize("pattern", ["data", "data/**", "data/**/*.txt"])
def test_entries_left_out_are_reported_in_one_line(tree, pattern):
    console = listening()
    files = expand_paths([pattern], console)
    (line,) = console.export_text().splitlines()
    if pattern == "data/**/*.txt":  # nothing else was asked for
        assert line == "not read: 1 hidden (data/.git), 1 unreadable (data/gone.txt); 1 files read"
        return
    assert len(files) == 3 and line == (
        "not read: 1 hidden (data/.git), 1 unreadable (data/gone.txt), 1 of another kind (data/notes.md); 3 files read"
    )
    console = listening()
    expand_paths(["data/a.jsonl", "ext/*.jsonl"], console)
    assert console.export_text() == ""


@pytest.mark.parametrize("pattern", ["data", "data/**", "data/**/*.txt"])
def test_loops_end(tree, pattern):
    """Links to the folder itself, to one above, and two folders that each lead to the other."""
    for name in ("data/gone.txt", "data/linked"):
        (tree / name).unlink()
    (tree / "data/self").symlink_to(".")
    (tree / "data/up").symlink_to("..")
    for name, other in (("p", "q"), ("q", "p")):
        (tree / "data" / name).mkdir()
        (tree / "data" / name / f"{name}.txt").write_text("x")
        (tree / "data" / name / f"to_{other}").symlink_to(f"../{other}")
    found = find_files([pattern])
    names = {path.name for path in found.files.values()}
    assert names == {"a.jsonl", "p.txt", "q.txt"} - ({"a.jsonl"} if ".txt" in pattern else set())
    assert len(found.left_out["leading back to its own folder"]) == 4
    assert "4 leading back to its own folder (data/p/to_q/to_p)" in found.lines()[0]
    assert len(found.twice) == 2 and found.lines()[1].startswith("named more than once and read once: 2 files")


def test_hidden_names_that_a_pattern_spells(tree):
    assert [str(path) for path in expand_paths(["data/**/.git/*.txt"])] == ["data/.git/d.txt"]
    assert [str(path) for path in expand_paths(["data/.git"])] == ["data/.git/d.txt"]


def test_a_folder_that_cannot_be_read(tree, monkeypatch):
    real = os.scandir

    def scandir(path):
        if str(path).endswith(("deep", "locked")):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr("minimind.data.paths.os.scandir", scandir)
    found = find_files(["data"])
    assert len(found.files) == 2
    assert list(found.left_out["unreadable"]) == [Path("data/linked/deep"), Path("data/gone.txt")]
    (tree / "locked").mkdir()
    with pytest.raises(ValueError, match=r"locked: cannot be read \(Permission denied\)"):
        find_files(["locked"])


@pytest.mark.parametrize(
    ("again", "told"),
    [
        ("data/a.jsonl", "data/a.jsonl again"),
        ("ext/../data/a.jsonl", "ext/../data/a.jsonl is data/a.jsonl"),
        ("link.jsonl", "link.jsonl is data/a.jsonl"),
        ("data/*.jsonl", "data/a.jsonl again"),
    ],
)
def test_a_file_named_twice_is_read_once_and_reported(tree, again, told):
    (tree / "link.jsonl").symlink_to("data/a.jsonl")
    console = listening()
    assert expand_paths(["data/a.jsonl", again], console) == [Path("data/a.jsonl")]
    said = f"named more than once and read once: 1 files, the first: {told}"
    assert console.export_text().splitlines() == [said]


def test_names_in_any_bytes(tmp_path):
    """Chinese names and bytes that are not UTF-8 are read, cached, and survive a round trip through JSON."""
    names = ["字.jsonl", os.fsdecode(b"gbk_\xca\xfd\xbe\xdd.jsonl")]
    for number, name in enumerate(names):
        write_jsonl(tmp_path / name, [f"text {number}"])
    console = listening()
    corpus = open_corpus([tmp_path, tmp_path / names[1]], ByteTokenizer(), tmp_path / "cache", console=console)
    assert sorted(text_of(corpus.document(i)) for i in range(2)) == ["text 0", "text 1"]
    open_corpus([tmp_path / "*.jsonl"], ByteTokenizer(), tmp_path / "cache", console=QUIET)
    write_json(tmp_path / "config.json", {"data": names})
    assert read_json(tmp_path / "config.json") == {"data": names}
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) == {"data": names}


def test_the_tokenizer_reads_a_file_once_or_asks_for_one_weight(tree):
    script = runpy.run_path(str(ROOT / "train" / "tokenizer.py"))
    config = script["Config"](data=("data/a.jsonl", "data"), out=tree / "out")
    assert [(str(path), weight) for path, weight in script["weighted_sources"](config)] == [(n, 1.0) for n in EVERY]
    config = script["Config"](data=("data/a.jsonl", "data"), weights=(1.0, 2.0), out=tree / "out")
    with pytest.raises(ValueError, match=r"--data: data/a.jsonl is in two entries; give it one weight"):
        script["weighted_sources"](config)
