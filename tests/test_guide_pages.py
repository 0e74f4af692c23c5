"""The commands of the guide pages: all are read by their own parsers; the slow test runs those that need no network, no
GPU and no other program, in a temporary folder, as the page has them, with the flags of RULES after them.

    pytest -m slow tests/test_guide_pages.py      prints what ran, with which flags, and why the rest did not
"""

from __future__ import annotations

import ast
import contextlib
import gzip
import importlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from minimind.cli import COMMANDS
from tests import warm

ROOT = Path(__file__).parents[1]
GUIDES = [ROOT / "README.md"]
GUIDES += [ROOT / "docs" / f"{name}.md" for name in ("zero", "training", "serving", "agents", "reinforcement")]
GUIDES += sorted((ROOT / "docs" / "export").glob("*.md"))


def code_of(page: Path) -> Iterator[tuple[str, str]]:
    """(language or "", code) of each fenced and each indented block of a page."""
    lines = iter([*page.read_text(encoding="utf-8").splitlines(), ""])
    block: list[str] = []
    before = ""
    for line in lines:
        if fence := re.match(r"( *)```(\w*)", line):
            width = len(fence[1])
            inside = iter(lambda: next(lines), f"{fence[1]}```")
            yield fence[2], "".join(f"{each[width:]}\n" for each in inside)
        elif line.startswith("    ") and (block or not before.strip()):
            block.append(f"{line[4:]}\n")
        elif block:
            yield "", "".join(block)
            block = []
        before = line


def lines_of(code: str) -> Iterator[str]:
    """The commands of shell code, continued lines joined, without comments."""
    for line in re.sub(r"\\\n *", "", code).splitlines():
        if command := line.partition(" #")[0].strip():
            yield command


PAGES = [ROOT / "README.md", ROOT / "bench" / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
COMMAND = re.compile(
    r"(?:[A-Z_]+=\S+ +)*(?:minimind ([a-z]+)|(?:python|torchrun .*?) ((?:train|bench)/\w+\.py))(?= |$)(.*)"
)


def test_every_command_has_the_flags_that_the_pages_say():
    """Each is read by its own parser, also with the flags of RULES, for every page but the log of old commands. Nothing
    is run."""
    import tyro

    asked = {}
    for page in PAGES:
        code = [code for kind, code in code_of(page) if kind in ("", "bash") and page.name != "LOG.md"]
        lines = [line for block in code for line in lines_of(block)]
        lines += [f"{line} {rule.flags}" for line in lines if page in GUIDES and (rule := rule_of(line)) and rule.flags]
        found = (COMMAND.match(line) for line in lines)
        asked |= {(match[1] or match[2], match[3].strip()): page for match in found if match}
    names = {program for program, _ in asked}
    assert {"serve", "zero", "train/agent.py", "bench/serving.py"} <= names and len(asked) > 60
    scripts = {name: importlib.import_module(name[:-3].replace("/", ".")) for name in names if name.endswith(".py")}
    flags = {name: getattr(found, "Args", None) or found.Config for name, found in scripts.items()}
    flags |= {name: importlib.import_module(COMMANDS[name][0]).Args for name in names - set(flags)}
    for (name, rest), page in asked.items():
        told = io.StringIO()
        try:
            with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
                tyro.cli(flags[name], args=shlex.split(rest))
        except SystemExit:
            pytest.fail(f"{page.relative_to(ROOT)}: {name} {rest}: {told.getvalue()}")


@dataclass(frozen=True)
class Rule:
    """For commands that begin with `start`; the longest match counts.

    flags: appended. why: the reason not to run them. needs: packages without which they are not run. address: of a
    server, which is asked once and then ended by Ctrl-C. beside: a server to start first.
    """

    start: str
    flags: str = ""
    why: str = ""
    needs: tuple[str, ...] = ()
    address: str = ""
    beside: str = ""


SHORT = "--tokens 8192 --evals 1 --heldout 0.01"
CHATS = f"{SHORT} --eval-questions 4"
SAMPLED = "--rollouts 1 --prompts 4 --samples 2 --evals 1 --eval-prompts 4 --heldout 0.01"
STAGES = f"--flags pretrain='{SHORT}' sft='{CHATS}'"
SERVE = "minimind serve --model runs/sft-nano-builtin"
PEERS = "--out rows --preset nano --peer ours"
NEIGHBOUR = "another program; tests/interop runs it"
RULES = (
    Rule("make demo", why="installs packages; `minimind demo` is the same"),
    Rule("make test", why="the suite itself"),
    Rule("pytest", why="the suite itself"),
    Rule("source", why="needs what make demo installs"),
    Rule("pip", why="downloads packages"),
    Rule("minimind zero", STAGES),
    Rule("minimind zero --budget 2h --plan"),
    Rule("minimind zero --budget full", why="downloads data sets"),
    Rule("minimind data download", why="downloads data sets"),
    Rule("minimind chat", "--prompt hi --max-new-tokens 8"),
    Rule("minimind serve", address="http://127.0.0.1:8998/health", needs=("fastapi", "uvicorn", "llguidance")),
    Rule("minimind web", "--no-browser", address="http://127.0.0.1:8501", needs=("streamlit", "fastapi", "uvicorn")),
    Rule("minimind export"),
    Rule("minimind export --to gguf", needs=("gguf",)),
    Rule("minimind export --model runs/sft-nano-builtin --out small.gguf --dtype q4_k_m", needs=("llama_cpp",)),
    Rule("minimind evaluate --ppl", "--tokens 16384"),
    Rule("minimind evaluate --tasks", why="downloads a benchmark"),
    Rule("minimind evaluate --agent", "--limit 2"),
    Rule("minimind evaluate --agent --model http", "--limit 2", beside=SERVE, needs=("fastapi", "uvicorn")),
    Rule("python train/", CHATS),
    Rule("python train/pretrain.py", SHORT),
    Rule("python train/pretrain.py --data poems.jsonl", f"{SHORT} --preset nano"),
    Rule("python train/distill.py", SHORT),
    Rule("python train/reward.py", SHORT),
    Rule("python train/grpo.py", SAMPLED),
    Rule("python train/grpo.py --from runs/reason-minimind2-r1", f"{SAMPLED} --max-new-tokens 16"),
    Rule("python train/ppo.py", SAMPLED.replace("--samples 2", "--samples 1")),
    Rule("python train/spo.py", SAMPLED.replace("--samples 2", "--samples 1")),
    Rule("python train/agent.py", f"{SAMPLED} --max-new-tokens 8 --turn-tokens 8"),
    Rule("python train/tokenizer.py", "--vocab-size 400"),
    Rule("python train/sft.py --data builtin:agent", f"{SHORT} --eval-questions 0"),
    Rule("python train/sft.py --data sft_2048.jsonl", "--no-plan-measure"),
    Rule("python train/sft.py --data some_rows.jsonl", "--no-plan-measure"),
    Rule("python bench/throughput.py", f"{PEERS} upstream-style --steps 1 --warmup 1 --turn 1 --rows 1 --seq-len 64"),
    Rule("python bench/decode.py", f"{PEERS} naive --batch 1 --prompt 8 --new 8 --turns 1"),
    Rule("python bench/serving.py", "--clients 2 --seconds 1 --new 16 --out rows", needs=("fastapi", "uvicorn")),
    Rule("python bench/card.py", why="needs a GPU"),
    Rule("OPENAI_API_BASE_URL=", why=NEIGHBOUR),
    Rule("PACKAGES=", why=NEIGHBOUR),
    Rule("python $PACKAGES", why=NEIGHBOUR),
    Rule("python -m vllm", why=NEIGHBOUR),
    Rule("curl http://localhost:8000", why=NEIGHBOUR),
    Rule("llama-server", why=NEIGHBOUR),
    Rule("llama-cli", why="another program, not run yet"),
    Rule("llama-quantize", why="another program, not run yet"),
    Rule("touch torchaudio.py", why=NEIGHBOUR),
    Rule("export PYTHONPATH=.", why=NEIGHBOUR),
    Rule("llamafactory-cli", why=NEIGHBOUR),
    Rule("ollama", why="another program, on no package index"),
    Rule("CC=clang", why="compiles another program"),
    Rule("CMAKE_ARGS=", why="compiles another program"),
    Rule("import"),  # Python of the pages
    Rule("from"),
    Rule("from openai", beside=SERVE),
    Rule("def"),
)  # fmt: skip


def rule_of(command: str) -> Rule | None:
    return max((rule for rule in RULES if command.startswith(rule.start)), key=lambda r: len(r.start), default=None)


def written_on(page: Path) -> Iterator[str]:
    """Commands and, with their line breaks, blocks of Python, in the order of the page."""
    for kind, code in code_of(page):
        if kind == "python":
            yield code
        elif kind in ("", "bash"):
            yield from lines_of(code)


def missing(command: str, rule: Rule) -> list[str]:
    """Packages that are needed and not installed."""
    names = list(rule.needs)
    for node in ast.walk(ast.parse(command)) if "\n" in command else ():
        names += [name.name for name in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
    return sorted({top for name in names if importlib.util.find_spec(top := name.partition(".")[0]) is None})


def test_every_command_is_run_or_says_why_not():
    """A command that no rule covers fails, and so does a rule that no command needs."""
    commands = [(page, command) for page in GUIDES for command in written_on(page)]
    assert [f"{page.name}: {command}" for page, command in commands if rule_of(command) is None] == []
    used = {rule for _, command in commands if (rule := rule_of(command))}
    assert [rule.start for rule in RULES if rule not in used] == []
    assert sum(rule_of(command).why == "" for _, command in commands) > 60


# The command that makes each run that others open or continue from.
RUNS = {
    "pretrain-nano-builtin": "python train/pretrain.py",
    "sft-nano-builtin": "python train/sft.py",
    "sft-nano-arithmetic": "python train/sft.py --data builtin:arithmetic",
    "sft-nano-agent": "python train/sft.py --data builtin:agent",
    "lora-nano-builtin": "python train/lora.py",
    "reason-minimind2-r1": "python train/reason.py --out runs/reason-minimind2-r1",
    "reward-minimind2": "python train/reward.py --out runs/reward-minimind2",
    "zero-5min": "minimind zero --budget 5min",
}
BEFORE = {
    "python train/(sft|distill)": "pretrain-nano-builtin",
    "python train/(lora|reason|dpo|reward)|minimind (chat|serve|web|export|evaluate)": "sft-nano-builtin",
    "python train/(grpo|ppo|spo)": "sft-nano-arithmetic",
    "python train/agent": "sft-nano-agent",
}


def runs_before(command: str) -> list[str]:
    """The runs that a command needs: those that it names, or the newest of a stage."""
    named = re.findall(r"(?<!--out )\bruns/([\w.-]+)", command)
    if named or re.search("--(from|plan|model http)|builtin:", command):
        return named
    return [run for pattern, run in BEFORE.items() if re.match(pattern, command)]


TURNS = [{"role": "user", "content": "Who wrote it?"}, {"role": "assistant", "content": "Li Bai wrote it."}]


class Workplace:
    """A folder per page, with the scripts, the files that pages name, and the runs of all pages."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files, self.runs = folder, folder / "files", folder / "runs"
        for place in (self.runs, self.files / "notes", self.files / "more"):
            place.mkdir(parents=True)
        poem = "The moon of poem {} shines on the river. 床前明月光，疑是地上霜。"
        texts = [{"text": poem.format(i) * 4} for i in range(400)]
        chats = [{"conversations": [{**TURNS[0], "content": f"Who wrote poem {i}?"}, TURNS[1]]} for i in range(400)]
        asked = [{"conversations": [chat["conversations"][0], {**TURNS[1], "content": ""}]} for chat in chats[:60]]
        rows = {"poems": texts, "chats": chats, "sft_2048": chats, "some_rows": chats, "rlaif": asked}
        for name, content in rows.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
            (self.files / f"{name}.jsonl").write_text(text, encoding="utf-8")
        book = "\n".join(f"Chapter {i}. It was a day like day {i - 1}, and the river was high." for i in range(2000))
        (self.files / "book.txt").write_text(book)
        (self.files / "notes" / "a.txt").write_text(book[:20_000])
        (self.files / "more" / "b.txt.gz").write_bytes(gzip.compress(book[20_000:40_000].encode()))
        self.environment = {**os.environ, "MINIMIND_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}

    def open(self, name: str) -> Path:
        place = self.folder / name
        place.mkdir()
        targets = [ROOT / "train", ROOT / "bench", self.runs, *self.files.iterdir()]
        for target in targets:
            (place / target.name).symlink_to(target)
        return place

    def words(self, command: str, place: Path) -> list[str]:
        """The command as the shell splits it, with this Python; or the file with a page's Python code."""
        if "\n" in command:
            number = len(list(place.glob("page_*.py")))
            (place / f"page_{number}.py").write_text(command, encoding="utf-8")
            return [sys.executable, f"page_{number}.py"]
        assert not set("|;&<>`$") & set(re.sub(r"'[^']*'", "", command)), f"{command}: needs a shell"
        first, *rest = shlex.split(command)
        return [sys.executable, *rest] if first == "python" else [sys.executable, "-m", first, *rest]

    def run(self, command: str, place: Path) -> None:
        answer = warm.run(self.words(command, place), env=self.environment, cwd=place, timeout=300)
        said = (answer.stdout + answer.stderr)[-1500:]
        assert answer.returncode == 0, f"{command}: status {answer.returncode}: {said}"

    @contextlib.contextmanager
    def serving(self, command: str, address: str, place: Path) -> Iterator[None]:
        """A server, from its first answer to the end of the block, when Ctrl-C must end it in an orderly way."""
        assert not answers(address), f"{address}: another program answers there"
        process = warm.popen(self.words(command, place), self.environment, place, subprocess.PIPE, subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 90
            while not answers(address):
                assert process.poll() is None and time.monotonic() < deadline, f"{command}: no answer at {address}"
                time.sleep(0.1)
            yield
        finally:
            process.send_signal(signal.SIGINT)
            said, _ = process.communicate(timeout=60)
        assert process.returncode in (0, 130) and "Traceback" not in (said or ""), f"{command}: {(said or '')[-1500:]}"

    def run_as_told(self, command: str, place: Path) -> None:
        """Run a command as its rule says, after what it needs."""
        rule = rule_of(command)
        assert rule is not None
        for name in runs_before(rule.beside or command):
            if not (self.runs / name).exists():
                with_own = self.folder / f"for-{name}"
                self.run_as_told(RUNS[name], with_own if with_own.exists() else self.open(with_own.name))
        if "--lora my-adapter" in command and not (place / "my-adapter").exists():  # another program's, in peft's form
            self.run_as_told("minimind export --model runs/lora-nano-builtin --to hf --out its-base", place)
            shutil.copytree(place / "its-base" / "adapter", place / "my-adapter")
        full = f"{command} {rule.flags}".strip() if "\n" not in command else command
        if rule.address:
            with self.serving(full, rule.address, place):
                return
        server = rule_of(rule.beside)
        with self.serving(rule.beside, server.address, place) if server else contextlib.nullcontext():
            self.run(full, place)


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("pages"))


@pytest.mark.slow
@pytest.mark.parametrize("page", GUIDES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_run(page, workplace, capsys):
    failed, ran, place = [], 0, workplace.open(str(page.relative_to(ROOT)).replace("/", "-"))
    for command in written_on(page):
        rule, began, why = rule_of(command), time.monotonic(), ""
        assert rule is not None, command
        if missing_packages := missing(command, rule):
            why = f"without {', '.join(missing_packages)}"
        if not (rule.why or why):
            ran += 1
            try:
                workplace.run_as_told(command, place)
            except AssertionError as problem:
                failed.append(f"{problem}")
                why = "FAILED"
        shown = " ".join((command.splitlines()[0], *(["..."] if "\n" in command else []), rule.flags)).strip()
        end = f"not run: {rule.why or why}" if rule.why or why.startswith("without") else why or "ran"
        with capsys.disabled():
            print(f"{shown}    [{end}, {time.monotonic() - began:.1f} s]", flush=True)
    with capsys.disabled():
        print(f"{page.relative_to(ROOT)}: {ran} commands ran, {len(failed)} of them failed", flush=True)
    assert not failed, "\n\n".join(failed)
