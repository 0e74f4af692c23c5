"""Make a folder with everything that bench/card.py needs on a GPU machine without a network.

    python bench/card_pack.py [--out build/card-pack] [--data FILE] [--check PYTHON]
    bash build/card-pack/start.sh --minutes 9 --out DIR           on that machine

The machine must have Python 3.12 on x86-64, PyTorch, transformers, pytest and a few more packages (PRESENT in this file
lists them). The folder has wheels of all other packages, the committed source with the native operators built here, the
commit's name, and text to train on, already tokenized. --check rehearses in a fresh environment without a package
index, which has only the packages of that list, taken from PYTHON.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # `bench`, and no `kernels` for transformers to find

import zstandard
from rich.console import Console

from bench.cards.tasks import GPU_MODULES
from bench.common.command import run
from bench.common.record import ROOT
from minimind.data import builtin_corpus, open_corpus
from minimind.data.reader import read_documents
from minimind.ops.native_build import PARTS, REPORT, library_name, source_hash
from minimind.tokenization import load_tokenizer

LARGEST = 60  # MB of the folder
WHEELS = (
    "annotated_doc", "annotated_types", "docstring_parser", "fastapi", "liger-kernel", "llguidance",
    "opentelemetry-api", "prometheus_client", "pydantic", "pydantic_core", "starlette", "typeguard",
    "typing_extensions", "typing_inspection", "tyro", "uvicorn", "zstandard",
)  # fmt: skip
PRESENT = (
    "torch", "triton", "transformers", "numpy", "filelock", "hypothesis", "jinja2", "matplotlib", "psutil", "pytest",
    "pytest-xdist", "rich", "safetensors", "tokenizers", "httpx", "anyio", "click", "h11", "setuptools",
)  # fmt: skip
PLATFORMS = ("manylinux_2_31_x86_64", "manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
LEFT_OUT = ("docs", "bench/results")  # folders of the source without code
# Run by the interpreter of --check: prints the top-level paths of the packages of PRESENT and their requirements.
CLOSURE = """
import json, re, sys
from importlib import metadata
todo, seen, paths = sys.argv[1:], set(), set()
while todo:
    name = re.split(r"[^A-Za-z0-9._-]", todo.pop())[0]
    key = re.sub(r"[-_.]+", "-", name).lower()
    if key in seen:
        continue
    seen.add(key)
    try:
        package = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        continue
    todo += [need for need in package.requires or [] if "extra ==" not in need]
    tops = {str(file).split("/")[0] for file in package.files or []} - {"..", "__pycache__"}
    paths |= {str(package.locate_file(top)) for top in tops}
print(json.dumps(sorted(paths)))
"""


@dataclass(frozen=True)
class Args:
    """Make the folder."""

    out: str = "build/card-pack"
    """The folder; an existing one is replaced."""
    data: str | None = None
    """A file of text, as in train/pretrain.py; None: the built-in corpus."""
    megabytes: float = 12.0
    """Megabytes of text to take, from its beginning."""
    check: str | None = None
    """A Python 3.12 with PyTorch, to rehearse from the folder in a fresh environment, which takes minutes."""


def main(args: Args) -> int:
    """The exit status: 1 if the check fails."""
    console = Console()
    out = Path(args.out).resolve()
    commit = clean_commit()
    libraries = built_libraries()
    if out.exists():
        if not (out / "start.sh").exists():
            raise ValueError(f"--out {out}: exists and was not made by this command; name another folder")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / "commit").write_text(commit + "\n", encoding="utf-8")
    shutil.copy(ROOT / "bench" / "cards" / "start.sh", out / "start.sh")
    write_source(out / "source.tar.gz", libraries)
    download(out / "wheels")
    write_text(args, out, console)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 1e6
    console.print(f"{out}: {size:.1f} MB, commit {commit}", highlight=False, soft_wrap=True)
    if size > LARGEST:
        raise ValueError(f"{out}: {size:.0f} MB, larger than {LARGEST}; take less text with --megabytes")
    return 0 if args.check is None else check(out, args.check)


def clean_commit() -> str:
    """The name of the commit. ValueError if the working tree differs from it."""
    if git("status", "--porcelain", "--untracked-files=no"):
        raise ValueError("there are uncommitted changes, and only the commit is packed; commit them")
    return git("describe", "--always", "--abbrev=12").decode().strip()


def git(*command: str) -> bytes:
    answer = subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True)
    if answer.returncode:
        raise ValueError(f"git {command[0]}: {answer.stderr.decode(errors='replace').strip()}")
    return answer.stdout


def built_libraries(package: Path = ROOT / "minimind") -> list[Path]:
    """The native operators and their report. ValueError unless all were built from this source."""
    record = package / REPORT
    report = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    for part in PARTS:
        exists = (package / library_name(part)).exists()
        if not exists or report.get(part, {}).get("sources") != source_hash(ROOT, part):
            raise ValueError(f"{library_name(part)} is not built from this source: python minimind/ops/native_build.py")
    return [record, *(package / library_name(part) for part in PARTS)]


def write_source(path: Path, libraries: Sequence[Path]) -> None:
    """Pack the committed files except LEFT_OUT, and the libraries in minimind/."""
    left_out = (f":(exclude){folder}" for folder in LEFT_OUT)
    committed = io.BytesIO(git("archive", "--format=tar", "HEAD", "--", ".", *left_out))
    with tarfile.open(fileobj=committed) as source, tarfile.open(path, "w:gz") as target:
        for entry in source:
            target.addfile(entry, source.extractfile(entry) if entry.isfile() else None)
        for library in libraries:
            target.add(library, f"minimind/{library.name}", filter=anonymous)


def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def download(folder: Path) -> None:
    """Download WHEELS in the versions of constraints.txt, for Python 3.12 on x86-64."""
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
        "--only-binary", ":all:", "--python-version", "3.12", "--implementation", "cp", *platforms,
        "--constraint", str(ROOT / "constraints.txt"), "--dest", str(folder), *WHEELS,
    ]  # fmt: skip
    if subprocess.run(command).returncode:
        raise ValueError("pip download failed; it needs a network")


def write_text(args: Args, out: Path, console: Console) -> None:
    """Write text.jsonl.zst and its tokens, which the loader finds by the file's content."""
    source = Path(args.data) if args.data else builtin_corpus(None, console)
    rows, left = [], int(args.megabytes * 1e6)
    for document in read_documents(source):
        left -= document.num_bytes
        if left < 0:
            break
        rows.append(json.dumps({"text": document.text}, ensure_ascii=False) + "\n")
    path = out / "text.jsonl.zst"
    path.write_bytes(zstandard.compress("".join(rows).encode(), 12))
    with tempfile.TemporaryDirectory(prefix="minimind-card-") as place:
        open_corpus([path], load_tokenizer(), place, console=console)
        shutil.copytree(Path(place) / "tokens", out / "tokens", ignore=shutil.ignore_patterns("*.lock"))


def check(pack: Path, python: str) -> int:
    """Rehearse in a fresh environment. Returns the exit status."""
    with tempfile.TemporaryDirectory(prefix="minimind-card-check-") as folder:
        place = Path(folder)
        subprocess.run([python, "-m", "venv", str(place / "env")], check=True)
        interpreter = place / "env" / "bin" / "python"
        link_present(python, place / "present")
        query = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        site = Path(
            subprocess.run([interpreter, "-c", query], capture_output=True, text=True, check=True).stdout.strip()
        )
        (site / "present.pth").write_text(f"{place / 'present'}\n", encoding="utf-8")
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment |= {"PYTHON": str(interpreter), "CARD_PLACE": str(place / "card"), "PIP_NO_INDEX": "1"}
        flags = ("--rehearse", "--minutes", "60", "--out", str(place / "out"))
        rehearsed = subprocess.run(["bash", str(pack / "start.sh"), *flags], cwd=place, env=environment)
        environment["PYTHONPATH"] = str(place / "card" / "site")
        imported = subprocess.run([interpreter, "-c", f"import {', '.join(GPU_MODULES)}"], cwd=place, env=environment)
        return rehearsed.returncode or imported.returncode


def link_present(python: str, folder: Path) -> None:
    """Link the packages of PRESENT and their requirements from that interpreter into `folder`."""
    answer = subprocess.run([python, "-c", CLOSURE, *PRESENT], capture_output=True, text=True, check=True)
    folder.mkdir()
    for path in map(Path, json.loads(answer.stdout)):
        (folder / path.name).symlink_to(path)


if __name__ == "__main__":
    run(main, Args, __doc__)
