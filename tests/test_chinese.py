"""A Chinese page says what its English page says: the code, formulas, figures and links of one cannot change without
the other. The English tour's code is executed by test_tour.py, and the Chinese tour repeats it byte for byte."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOUR = ROOT / "docs" / "tour"
# Each English page and its Chinese page. Every page of the tour has one, and the pages of docs/ that docs/zh repeats.
CHINESE = {ROOT / "README.md": ROOT / "README_zh.md"}
CHINESE |= {page: TOUR / "zh" / page.name for page in sorted(TOUR.glob("*.md"))}
CHINESE |= {page.parents[1] / page.name: page for page in sorted((ROOT / "docs" / "zh").glob("*.md"))}
OWN_LINE = re.compile(r"#+ |- |\d+\. |\|")  # a heading, a list item or a table row begins a block of its own
FORMULA = "    "  # the mark of an indented block
LINK = re.compile(r"(!?)\[[^\[\]]*\]\(([^()\s]+)\)")
CODE = re.compile(r"`([^`]+)`")
COMMENT = re.compile(r"(^|\s+)#(\s.*)?$")
# A number, its sign, all that is written on to it (12.5x, 99.1%, bf16, 95d32b8007a5, 1e-4) and its unit of memory.
NUMBER = re.compile(r"(?:(?<![\w.-])-)?[\w.,%]*[0-9][\w.,%]*(?:(?<=[0-9][eE])[-+][0-9]+)?(?: [KMGT]i?B\b)?", re.ASCII)
SIGN = re.compile(r"[-=+*/^()<>|]|\d+(?:\.\d+)?")
NAME = re.compile(r"[A-Za-z]\w*", re.ASCII)


@dataclass(frozen=True)
class Block:
    """A heading, paragraph, list item, table row, formula or block of code: kind is its mark, "" for a paragraph."""

    kind: str
    text: str
    line: int  # at which it begins

    @property
    def is_prose(self) -> bool:
        return self.kind != FORMULA and not self.kind.startswith("```")


@dataclass(frozen=True)
class Pair:
    """A page in both languages: its blocks side by side, which are of the same kinds in the same order."""

    english: Path
    chinese: Path
    blocks: list[tuple[Block, Block]]

    @property
    def prose(self) -> list[tuple[Block, Block]]:
        return [pair for pair in self.blocks if pair[0].is_prose]

    def place(self, pair: tuple[Block, Block]) -> str:
        pages = self.english, self.chinese
        return "\n".join(f"{p.relative_to(ROOT)}:{b.line}: {b.text}" for p, b in zip(pages, pair, strict=True))


def blocks(text: str) -> list[Block]:
    """Every line of text that is not blank is in one block; wrapped lines are joined by a space, except in code."""
    found: list[Block] = []
    going_on = False  # whether the next line may belong to the last block
    for number, line in enumerate(text.splitlines(), 1):
        last = found[-1] if found else Block("", "", 0)
        own = OWN_LINE.match(line)
        if going_on and last.kind.startswith("```"):
            going_on = line != "```"
            if going_on:
                found[-1] = Block(last.kind, f"{last.text}{line}\n", last.line)
        elif line.startswith("```"):
            found.append(Block(line, "", number))
            going_on = True
        elif own:
            found.append(Block(own.group().strip(), line, number))
            going_on = own.group()[0] not in "#|"
        elif not line.strip():
            going_on = False
        elif going_on and last.kind == FORMULA:
            found[-1] = Block(last.kind, f"{last.text}{line}\n", last.line)
        elif going_on:
            found[-1] = Block(last.kind, f"{last.text} {line.strip()}", last.line)
        elif line.startswith(FORMULA):
            found.append(Block(FORMULA, f"{line}\n", number))
            going_on = True
        else:
            found.append(Block("", line.strip(), number))
            going_on = True
    assert not going_on or found[-1].kind[:3] != "```", f"code without an end in line {found[-1].line}"
    return found


def commands(block: Block) -> list[str]:
    """Code without its comments and blank lines; what a program printed (text) as it is."""
    lines = block.text.splitlines()
    if block.kind != "```text":
        lines = [COMMENT.sub("", line) for line in lines]
    return [line for line in lines if line.strip()]


def links(block: Block) -> list[tuple[str, str]]:
    """("!" for a picture or "", target) of each link; a link written in any other way is an error."""
    prose = CODE.sub("", block.text)
    found = LINK.findall(prose)
    rest = LINK.sub("", prose)
    assert not re.search(r"\]\(|://|\]:|\]\[|<\w", rest), f"a link that this test cannot read: {rest}"
    return found


def leads_to(page: Path, target: str) -> tuple[Path | str, str]:
    """(the file and the heading that a link of `page` leads to), or (the address, "")."""
    if target.startswith("https://"):
        return target, ""
    name, _, heading = target.partition("#")
    path = Path(os.path.normpath(page.parent / name))
    assert path.exists(), f"{page.relative_to(ROOT)}: no file {target}"
    if heading:
        titles = (block.text for block in blocks(path.read_text(encoding="utf-8")) if block.kind.startswith("#"))
        known = [re.sub(r"[^\w\- ]", "", title.lstrip("# ").lower()).replace(" ", "-") for title in titles]
        assert heading in known, f"{page.relative_to(ROOT)}: no heading {target}"
    return path, heading


def numbers(text: str) -> list[str]:
    found = [number.strip(".,") for number in NUMBER.findall(text)]
    digits, of_numbers = ([c for c in part if c.isdigit()] for part in (text, "".join(found)))
    assert digits == of_numbers, f"digits of another script: {text}"
    return found


@pytest.fixture(scope="module", params=CHINESE.items(), ids=lambda pages: str(pages[0].relative_to(ROOT)))
def page(request) -> Pair:
    english, chinese = request.param
    pair = Pair(english, chinese, [])
    here, there = (blocks(path.read_text(encoding="utf-8")) for path in request.param)
    for both in zip(here, there, strict=False):
        assert both[0].kind == both[1].kind, f"from here on the files differ in form\n{pair.place(both)}"
        pair.blocks.append(both)
    assert len(here) == len(there), f"{english}: one file goes on where the other ends"
    return pair


def test_code_blocks_hold_the_same_commands(page):
    """In the tour the same bytes; elsewhere comments are translated."""
    for pair in page.blocks:
        if pair[0].kind.startswith("```"):
            if page.english.parent == TOUR:
                assert pair[0].text == pair[1].text, page.place(pair)
            assert commands(pair[0]) == commands(pair[1]), page.place(pair)


def test_formulas_differ_in_words_only(page):
    """A line without Chinese words is the same. In any other the signs and numbers are, and no name is added."""
    for pair in page.blocks:
        if pair[0].kind == FORMULA:
            for english, chinese in zip(*(block.text.splitlines() for block in pair), strict=True):
                assert english == chinese or not chinese.isascii(), page.place(pair)
                assert SIGN.findall(english) == SIGN.findall(chinese), page.place(pair)
                assert set(NAME.findall(chinese)) <= set(NAME.findall(english)), page.place(pair)


def test_links_lead_to_the_same_pages_in_the_language_of_the_page(page):
    """Every page names the same page in the other language."""
    to_chinese = CHINESE | {page.chinese: page.english}
    named = 0
    for pair in page.prose:
        english, chinese = links(pair[0]), links(pair[1])
        expected = [(mark, *leads_to(page.english, target)) for mark, target in english]
        expected = [(mark, to_chinese.get(path, path), heading) for mark, path, heading in expected]
        found = [(mark, *leads_to(page.chinese, target)) for mark, target in chinese]
        assert Counter(expected) == Counter(found), page.place(pair)
        named += found.count(("", page.english, ""))
    assert named == 1


def test_every_number_stands_in_both(page):
    """In a table row in the same cells' order; in other blocks, comments in code included, as often."""
    for pair in page.blocks:
        english, chinese = (numbers(block.text) for block in pair)
        if pair[0].kind == "|":
            assert english == chinese and pair[0].text.count("|") == pair[1].text.count("|"), page.place(pair)
        missing, added = Counter(english) - Counter(chinese), Counter(chinese) - Counter(english)
        assert not missing and not added, f"missing {[*missing]}, added {[*added]}\n{page.place(pair)}"


def test_names_of_files_flags_and_commands_are_the_same(page):
    for pair in page.prose:
        english, chinese = (Counter(" ".join(c.split()) for c in CODE.findall(b.text)) for b in pair)
        assert english == chinese, page.place(pair)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from 2,136 tokens/s, 12.5x; 99.1% of 1,470 MiB.", ["2,136", "12.5x", "99.1%", "1,470 MiB"]),
        ("在 bf16 下为-3.5，提交95d32b8007a5（1e-4）", ["bf16", "-3.5", "95d32b8007a5", "1e-4"]),
        ("sm_80, 86 and a 26M-parameter model", ["sm_80", "86", "26M"]),
    ],
)
def test_numbers_are_found(text, expected):
    assert numbers(text) == expected


def test_digits_and_links_that_cannot_be_compared_are_refused():
    with pytest.raises(AssertionError, match="another script"):
        numbers("提速 １２ 倍")
    with pytest.raises(AssertionError, match="cannot read"):
        links(Block("", "see https://example.org", 1))
