"""The tour of docs/tour: its code runs and prints what the pages say, its links lead somewhere, its figures are drawn
by scripts."""

import contextlib
import importlib
import io
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOUR = ROOT / "docs" / "tour"
PAGES = sorted(TOUR.glob("*.md"))
LONGEST_PAGE, LARGEST_FIGURE = 130, 100_000
# A block of Python and, where the page shows it, what it prints.
BLOCK = re.compile(r"```python\n(?P<code>.*?)```\n(?:\n```text\n(?P<printed>.*?)```\n)?", re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
IMAGE = re.compile(r"!\[[^\]]+\]\(figures/(\w+)\.png\)")


@pytest.fixture
def at_root(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(str(TOUR))


def test_there_are_pages_and_the_index_names_them_all():
    chapters = [page.name for page in PAGES if page.name != "README.md"]
    index = (TOUR / "README.md").read_text(encoding="utf-8")
    assert chapters and [name for name in LINK.findall(index) if re.fullmatch(r"\d\d-\w+\.md", name)] == chapters


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_prints_what_the_page_says(page, at_root):
    """The blocks of a page run one after the other in one namespace."""
    namespace = {"__name__": "__main__"}
    text = page.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("```python")
    assert blocks or page.name == "README.md", "a page without anything that is checked"
    for block in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block["code"], page.name, "exec"), namespace)
        assert printed.getvalue() == (block["printed"] or ""), block["code"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in LINK.findall(text) if not link.startswith("https://")]
    assert links
    for link in links:
        assert (TOUR / link).exists(), link
    assert len(text.splitlines()) <= LONGEST_PAGE


def test_every_figure_has_a_script_and_a_place(at_root):
    names = importlib.import_module("draw").NAMES
    pictures = {path.stem: path.stat().st_size for path in (TOUR / "figures").glob("*.png")}
    shown = [name for page in PAGES for name in IMAGE.findall(page.read_text(encoding="utf-8"))]
    assert sorted(shown) == sorted(pictures) == names
    assert max(pictures.values()) < LARGEST_FIGURE


@pytest.mark.slow
def test_figures_are_drawn(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(TOUR))
    draw = importlib.import_module("draw")
    draw.main([], tmp_path)
    assert sorted(path.stem for path in tmp_path.glob("*.png")) == draw.NAMES
    with pytest.raises(ValueError, match="no figure 'nothing'; choose from attention"):
        draw.main(["nothing"], tmp_path)
    assert str(ROOT) in sys.path
