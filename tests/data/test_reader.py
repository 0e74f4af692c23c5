import gzip
import json
import os
import re
from pathlib import Path
from unittest.mock import patch

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.data.reader import PIECE_BYTES, BadRows, Document, iter_texts, read_documents

GOOD = b'{"text": "one"}\n\n{"text": "two \xe5\xad\x97"}\r\n   \n{"text": "three"}'


def put(path: Path, data: bytes) -> Path:
    if path.name.endswith(".gz"):
        data = gzip.compress(data)
    elif path.name.endswith(".zst"):
        data = zstandard.ZstdCompressor().compress(data)
    path.write_bytes(data)
    return path


def texts(path: Path, **options) -> list[str]:
    return [document.text for document in read_documents(path, **options)]


def error_of(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        list(read_documents(path))
    return str(caught.value)


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_rows_lines_and_places(tmp_path, ending):
    found = list(read_documents(put(tmp_path / f"a.{ending}", GOOD)))
    assert [(d.text, d.num_bytes, d.line) for d in found] == [("one", 3, 1), ("two 字", 7, 3), ("three", 5, 5)]
    assert (found[-1].end.offset, found[-1].end.line) == (len(GOOD), 5)


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst", "txt", "txt.gz", "txt.zst"])
def test_reading_can_resume_after_any_document(tmp_path, ending):
    data = b'{"text": "a long enough text to be a document"}\n' * 5000
    path = put(tmp_path / f"a.{ending}", data)
    whole = list(read_documents(path))
    for i in range(0, len(whole), max(1, len(whole) // 7)):
        assert list(read_documents(path, start=whole[i].end)) == whole[i + 1 :]


def test_byte_order_mark_is_not_text(tmp_path):
    assert texts(put(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "a"}\n')) == ["a"]
    assert texts(put(tmp_path / "a.txt", b"\xef\xbb\xbfa\n")) == ["a\n"]


def test_a_line_of_ten_megabytes(tmp_path):
    long = "字" * 3_500_000
    assert texts(put(tmp_path / "a.jsonl", json.dumps({"text": long}).encode())) == [long]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b'{"text": "a"', "malformed JSON (Expecting ',' delimiter at column 13)"),
        (b'["a"]', 'the row is a list, not an object such as {"text": "..."}'),
        (b'{"txt": "a"}', 'no field "text" (fields: txt)'),
        (b'{"text": 3}', 'field "text" is a number, not a string'),
        (b'{"text": null}', 'field "text" is null, not a string'),
        (b'{"text": ""}', 'field "text" is empty'),
        (b'{"text": " \\n"}', 'field "text" is empty'),
        (b'{"text": "\xff"}', "invalid UTF-8 (byte 0xff)"),
        (b'{"text": "a\\ud800b"}', "the text holds a lone surrogate (\\ud800), which is not a character"),
        (b"[" * 100_000, "malformed JSON (nested too deeply)"),
    ],
)
def test_a_bad_row_is_named_or_skipped(tmp_path, row, reason):
    path = put(tmp_path / "a.jsonl", b'{"text": "good"}\n\n' + row + b'\n{"text": "more"}\n')
    assert error_of(path) == f"{path}:3: {reason}; fix the row or pass --on-bad-row skip"
    bad = BadRows()
    assert texts(path, on_bad_row="skip", bad=bad) == ["good", "more"]
    assert bad == BadRows(1, [(3, reason)])


def test_a_huge_number_is_a_bad_row(tmp_path):
    assert ":1: " in error_of(put(tmp_path / "a.jsonl", b'{"text": ' + b"1" * 10_000 + b"}\n"))


def test_many_bad_rows_are_counted_and_the_first_remembered(tmp_path):
    bad = BadRows()
    assert texts(put(tmp_path / "a.jsonl", b"x\n" * 100), on_bad_row="skip", bad=bad) == []
    assert (bad.count, [line for line, _ in bad.first]) == (100, [1, 2, 3, 4, 5])


def test_unknown_policy(tmp_path):
    with pytest.raises(ValueError, match="--on-bad-row must be error or skip, not 'ignore'"):
        texts(put(tmp_path / "a.jsonl", GOOD), on_bad_row="ignore")


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
@pytest.mark.parametrize(("ending", "name"), [("gz", "gzip"), ("zst", "Zstandard")])
def test_truncated_and_corrupt_streams(tmp_path, kind, ending, name):
    rows = b"".join(b'{"text": "%s"}\n' % os.urandom(40).hex().encode() for _ in range(5000))
    path = put(tmp_path / f"a.{kind}.{ending}", rows)
    whole, n = path.read_bytes(), len(texts(path))
    path.write_bytes(whole[: len(whole) // 2])
    match = re.fullmatch(r"(.*):(\d+): the (\w+) stream is truncated; fix .* skip", error_of(path))
    assert match and match[1] == str(path) and match[3] == name and 1000 < int(match[2]) < 4000
    bad = BadRows()
    assert 0 < len(texts(path, on_bad_row="skip", bad=bad)) < n
    assert bad.count == 1
    if ending == "gz":
        path.write_bytes(whole[:-8] + b"\0" * 4 + whole[-4:])
        assert "the gzip stream is corrupt (CRC check failed" in error_of(path)
    path.write_bytes(b"not compressed at all\n")
    assert f"{path}:1: the {name} stream is corrupt (" in error_of(path)


def test_several_frames_in_one_file(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    frame = zstandard.ZstdCompressor().compress
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"abcd"
    path.write_bytes(skippable + frame(b'{"text": "a"}\n{"te') + skippable + frame(b'xt": "b"}\n'))
    assert texts(path) == ["a", "b"]
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n{"te') + gzip.compress(b'xt": "b"}\n'))
    assert texts(path) == ["a", "b"]


def check_pieces(pieces: list[Document], data: bytes, longest: int = PIECE_BYTES) -> None:
    assert "".join(piece.text for piece in pieces).encode() == data
    assert all(0 < piece.num_bytes == len(piece.text.encode()) <= longest for piece in pieces)
    assert all(data[: piece.end.offset].count(b"\n") == piece.end.line for piece in pieces)


def test_text_is_cut_at_line_ends(tmp_path):
    lines = b"".join(b"line %d of the text\r\n" % i for i in range(10_000))
    pieces = list(read_documents(put(tmp_path / "a.txt", lines)))
    check_pieces(pieces, lines)
    assert all(piece.text.endswith("\n") and piece.num_bytes > PIECE_BYTES - 40 for piece in pieces[:-1])


@settings(deadline=None)
@given(st.text(st.sampled_from("aé字𝄞\n"), max_size=80))
def test_any_text_stays_whole_and_reading_can_resume_after_any_piece(tmp_path_factory, text):
    path = put(tmp_path_factory.mktemp("text") / "a.txt", text.encode())
    with patch("minimind.data.reader.PIECE_BYTES", 13):
        pieces = list(read_documents(path))
        check_pieces(pieces, text.encode(), 13)
        for i, piece in enumerate(pieces):
            assert list(read_documents(path, start=piece.end)) == pieces[i + 1 :]


def test_bad_lines_of_text(tmp_path):
    path = put(tmp_path / "a.txt", b"good\nb\xffd\nmore\n\xe5\xad")
    assert error_of(path) == f"{path}:2: invalid UTF-8 (byte 0xff); fix the row or pass --on-bad-row skip"
    bad = BadRows()
    assert texts(path, on_bad_row="skip", bad=bad) == ["good\nmore\n"]
    assert bad.first == [(2, "invalid UTF-8 (byte 0xff)"), (4, "the file ends inside a UTF-8 character")]


def test_texts_of_every_stage(tmp_path):
    rows = [
        {"text": "pretrain"},
        {"conversations": [{"role": "system", "content": "", "tools": '[{"name": "f"}]'}, {"content": "hi"}]},
        {"conversations": [{"reasoning_content": "why", "content": "so", "tool_calls": [{"name": "字"}]}]},
        {"chosen": [{"role": "user", "content": "q"}], "rejected": [{"role": "user", "content": "r"}]},
    ]
    path = put(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)).encode())
    expected = ["pretrain", '[{"name": "f"}]', "hi", "so", "why", '[{"name": "字"}]', "q", "r"]
    assert list(iter_texts(path)) == expected
    assert list(iter_texts(put(tmp_path / "a.txt.gz", b"plain\ntext"))) == ["plain\ntext"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"prompt": "a"}', 'none of the fields "text", "conversations", "chosen" and "rejected"'),
        ('{"conversations": "a"}', 'field "conversations" is a string, not a list of messages'),
        ('{"chosen": ["a"], "rejected": []}', 'field "chosen" holds a string, not a message object'),
        ('{"conversations": [{"content": "\\udc00"}]}', "the text holds a lone surrogate (\\udc00), which is not"),
    ],
)
def test_bad_rows_of_every_stage(tmp_path, row, reason):
    path = put(tmp_path / "a.jsonl", b'{"text": "ok"}\n' + row.encode() + b"\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}:2: {reason}")):
        list(iter_texts(path))
    assert list(iter_texts(path, "skip")) == ["ok"]
