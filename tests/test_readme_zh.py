"""README_zh.md says what README.md says: the figures, commands and links of one cannot change without the other."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = "README.md", "README_zh.md"
OWN_LINE = re.compile(r"#+ |- |\|")  # a heading, a list item or a table row begins a block of its own
LINK = re.compile(r"(!?)\[[^\[\]]*\]\(([^()\s]+)\)")
CODE = re.compile(r"`([^`]+)`")
COMMENT = re.compile(r"(^|\s+)#(\s.*)?$")
# A number, its sign, all that is written on to it (12.5x, 99.1%, bf16, 95d32b8007a5, 1e-4) and its unit of memory.
NUMBER = re.compile(r"(?:(?<![\w.-])-)?[\w.,%]*[0-9][\w.,%]*(?:(?<=[0-9][eE])[-+][0-9]+)?(?: [KMGT]i?B\b)?", re.ASCII)


@dataclass(frozen=True)
class Block:
    """A heading, paragraph, list item, table row or block of code: kind is its mark, "" for a paragraph."""

    kind: str
    text: str
    line: int  # at which it begins


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
            going_on = own.group() == "- "
        elif not line.strip():
            going_on = False
        elif going_on:
            found[-1] = Block(last.kind, f"{last.text} {line.strip()}", last.line)
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


def numbers(text: str) -> list[str]:
    found = [number.strip(".,") for number in NUMBER.findall(text)]
    digits, of_numbers = ([c for c in part if c.isdigit()] for part in (text, "".join(found)))
    assert digits == of_numbers, f"digits of another script: {text}"
    return found


def place(pair: tuple[Block, Block]) -> str:
    return "\n".join(f"{name}:{block.line}: {block.text}" for name, block in zip(NAMES, pair, strict=True))


@pytest.fixture(scope="module")
def pairs() -> list[tuple[Block, Block]]:
    """The blocks of both files side by side, which must be of the same kinds in the same order."""
    english, chinese = (blocks((ROOT / name).read_text(encoding="utf-8")) for name in NAMES)
    for pair in zip(english, chinese, strict=False):
        assert pair[0].kind == pair[1].kind, f"from here on the files differ in form\n{place(pair)}"
    assert len(english) == len(chinese), "one file goes on where the other ends"
    return list(zip(english, chinese, strict=True))


def test_code_blocks_hold_the_same_commands(pairs):
    code = [pair for pair in pairs if pair[0].kind.startswith("```")]
    assert code
    for pair in code:
        assert commands(pair[0]) == commands(pair[1]), place(pair)


def test_links_and_pictures_are_the_same_and_the_files_name_each_other(pairs):
    swapped = {("", "README_zh.md"): ("", "README.md")}
    prose = [pair for pair in pairs if not pair[0].kind.startswith("```")]
    english = [swapped.get(link, link) for pair in prose for link in links(pair[0])]
    chinese = [link for pair in prose for link in links(pair[1])]
    assert english == chinese
    assert chinese.count(("", "README.md")) == 1
    for _, target in chinese:
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_every_number_stands_in_both(pairs):
    """In a table row in the same cells' order; in other blocks, comments in code included, as often."""
    for pair in pairs:
        english, chinese = (numbers(block.text) for block in pair)
        if pair[0].kind == "|":
            assert english == chinese and pair[0].text.count("|") == pair[1].text.count("|"), place(pair)
        missing, added = Counter(english) - Counter(chinese), Counter(chinese) - Counter(english)
        assert not missing and not added, f"missing {[*missing]}, added {[*added]}\n{place(pair)}"


def test_names_of_files_flags_and_commands_are_the_same(pairs):
    for pair in pairs:
        if not pair[0].kind.startswith("```"):
            english, chinese = (Counter(" ".join(c.split()) for c in CODE.findall(b.text)) for b in pair)
            assert english == chinese, place(pair)


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
