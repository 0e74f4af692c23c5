import json
import subprocess
import sys
from hashlib import blake2b
from pathlib import Path

import pytest

from minimind.data.builtin import docstrings as corpus_module
from minimind.data.builtin.docstrings import builtin_corpus, collect
from minimind.data.reader import read_documents
from tests.data.fake import QUIET

LONG = "A sentence that is long enough to be kept, because it has more than eighty characters in it, number "


@pytest.fixture
def library(tmp_path):
    root = tmp_path / "library"
    (root / "tests").mkdir(parents=True)
    body = f'    """{LONG}2.\n\n        indented\n    last\n    """\n'
    (root / "a.py").write_text(f'"""{LONG}1."""\nclass A:\n{body}    def f(self):\n        "short"\n')
    (root / "b.py").write_text(f'def f():\n    """{LONG}1."""\n    async def g():\n        """{LONG}3. 字"""\n')
    (root / "c.py").write_text(f'if True:\n    def f():\n        """{LONG}4: \\d"""\n')
    (root / "broken.py").write_text(f'"""{LONG}5."""\ndef (:\n')
    (root / "latin.py").write_bytes(b'"""\xff\xfe"""')
    (root / "nul.py").write_bytes(b"\0")
    (root / "surrogate.py").write_text(f'"""{LONG}\\ud800"""')
    (root / "gone.py").symlink_to(root / "nowhere")
    (root / "folder.py").mkdir()
    (root / "tests" / "t.py").write_text(f'"""{LONG}6."""')
    return root


def test_distinct_long_docstrings_of_files_that_parse(library):
    texts = collect([library], QUIET)
    expected = [LONG + "1.", LONG + "2.\n\n    indented\nlast", LONG + "3. 字", LONG + "4: \\d"]
    assert texts == sorted(expected, key=lambda text: blake2b(text.encode()).digest())


def test_the_location_of_the_files_does_not_matter(library, tmp_path):
    texts = collect([library], QUIET)
    (library / "a.py").rename(library / "z.py")
    library.rename(tmp_path / "other")
    assert collect([tmp_path / "nothing", tmp_path / "other"], QUIET) == texts


def test_the_file_is_built_once(library, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "_roots", lambda: [library])
    path = builtin_corpus(tmp_path / "cache", QUIET)
    data = path.read_bytes()
    assert {"text": LONG + "3. 字"} in [json.loads(line) for line in data.splitlines()]
    assert len(list(read_documents(path))) == 4
    stamp = path.stat().st_mtime_ns
    assert builtin_corpus(tmp_path / "cache", QUIET) == path and path.stat().st_mtime_ns == stamp
    path.unlink()
    assert builtin_corpus(tmp_path / "cache", QUIET).read_bytes() == data
    assert [p.suffix for p in sorted(path.parent.iterdir())] in ([".jsonl"], [".jsonl", ".lock"])
    monkeypatch.setattr(corpus_module, "PACKAGES", ("numpy",))
    assert builtin_corpus(tmp_path / "cache", QUIET) != path


def test_an_installation_without_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "_roots", lambda: [tmp_path / "none"])
    with pytest.raises(ValueError, match="no library sources to take text from; name a file"):
        builtin_corpus(tmp_path / "cache", QUIET)


@pytest.mark.heavy
def test_two_processes_at_once_build_one_real_corpus(tmp_path):
    code = (
        "import sys; from minimind.data.builtin import docstrings; docstrings.PACKAGES = ('numpy',); "
        "print(docstrings.builtin_corpus(sys.argv[1])); assert 'torch' not in sys.modules"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=-1, stderr=-1, text=True) for _ in range(2)
    ]
    (path, said), (other, waited) = [process.communicate(timeout=60) for process in started]
    assert path == other and [process.returncode for process in started] == [0, 0]
    assert sum("built-in corpus: " in text for text in (said, waited)) == 1
    documents = list(read_documents(Path(path.strip())))
    assert len(documents) > 1000 and min(len(d.text) for d in documents) >= 80
    assert len({d.text for d in documents}) == len(documents)
