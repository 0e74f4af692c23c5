"""Chat with a model in the terminal: `minimind chat`.

    minimind chat                                   the newest run under runs/
    minimind chat --model runs/sft-nano-builtin --system "Answer briefly."
    minimind chat --model pretrain_512.pth --preset minimind2-small --tokenizer FOLDER
    minimind chat --prompt "Why is the sky blue?"   one answer; text piped to standard input does the same
    minimind chat --tools builtin                   run what the model calls, asking before each call

A model that was only pretrained, or whose tokenizer has no chat template, continues the text instead of answering it.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, TextIO, cast

from minimind.inference.engine import Engine
from minimind.inference.loading import ModelArgs, open_model
from minimind.inference.requests import Request, RequestOutput, SamplingParams
from minimind.inference.runner import Backend
from minimind.tokenization import Tokenizer
from minimind.tokenization.chat_encoder import END_THINK, THINK

HELP = """/reset          forget the conversation
/system TEXT    forget the conversation and set the system message, or remove it if there is no TEXT
/think on|off   reason before answering, or not; /think alone leaves it to the model
/help           show this list
/quit           leave, as Ctrl-D does. Ctrl-C stops an answer"""

THINKING = {"on": True, "off": False, None: None}


@dataclass(frozen=True)
class Args(ModelArgs):
    """Chat with a model in the terminal."""

    prompt: str | None = None
    """Answer this one question and exit. None: a conversation, or one answer to text piped to standard input."""
    raw: bool = False
    """Continue the text instead of answering it. This is the default for a model that was only pretrained."""
    force_chat: bool = False
    """Use the chat template although the model was only pretrained."""
    system: str | None = None
    """System message."""
    think: Literal["on", "off"] | None = None
    """Whether to reason before answering (the template's enable_thinking). None leaves it to the template."""
    history: int | None = None
    """Rounds of question and answer to remember. None: as many as fit the context."""
    max_new_tokens: int = 512
    """Longest answer, in tokens."""
    temperature: float = 0.8
    """Sampling temperature; 0 always takes the likeliest token."""
    top_p: float = 0.95
    """Sample from the smallest set of tokens with this probability; 1: from all."""
    top_k: int = 0
    """Sample from this many likeliest tokens; 0: from all."""
    min_p: float = 0.0
    """Leave out tokens whose probability is below this share of the likeliest token's."""
    repetition_penalty: float = 1.0
    """A value above 1 makes tokens that have occurred less likely."""
    seed: int | None = None
    """Seed of the sampling; the same seed gives the same answers. None: new answers each time."""
    tools: tuple[str, ...] = ()
    """Functions that the model may call, which then run: builtin, upstream, package.module:NAME of your own, or
    mcp:COMMAND or mcp:http://... of an MCP server."""
    yes: bool = False
    """With --tools: run calls without asking before each."""
    backend: Backend = "auto"
    """Decoding operators: native (compiled), reference (plain PyTorch), or auto: native if it is built."""


def main(args: Args) -> int:
    """Chat until the user leaves; returns the exit status. ValueError, one line, for bad input."""
    if args.history is not None and args.history < 0:
        raise ValueError(f"--history {args.history}: must be at least 0")
    if args.raw and args.force_chat:
        raise ValueError("--raw and --force-chat: give one of them")
    text = _one_shot(args)
    session, notes = open_session(args)
    for note in notes:
        print(note, file=sys.stderr)
    with _tools(session, args, sys.stderr if text is not None else sys.stdout) as session:
        if text is not None:
            Terminal(session, sys.stdout, sys.stderr).say(text)
            return 0
        return Terminal(session, sys.stdout, sys.stdout).loop()


@contextmanager
def _tools(session: ChatSession, args: Args, notices: TextIO) -> Iterator[ChatSession]:
    """The session, with the tools of --tools if there are any."""
    if not args.tools:
        yield session
        return
    from minimind.apps.tools import asks, with_tools
    from minimind.environments.builtin import named_tools
    from minimind.environments.running import ToolRunner

    with ToolRunner(named_tools(args.tools)) as runner:
        yield with_tools(session, runner, (lambda call: True) if args.yes else asks(notices))


def open_session(args: Args) -> tuple[ChatSession, list[str]]:
    """The chat session, and lines that the user should see before it begins."""
    params = SamplingParams(
        max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p, top_k=args.top_k,
        min_p=args.min_p, repetition_penalty=args.repetition_penalty, seed=args.seed,
    )  # fmt: skip
    loaded = open_model(args)
    notes = loaded.notes
    reason = ""
    if loaded.tokenizer.chat_template is None:
        reason = "its tokenizer has no chat template"
    elif loaded.stage == "pretrain" and not args.force_chat:
        reason = "it was only pretrained (--force-chat uses the chat template anyway)"
    if reason and args.force_chat:
        raise ValueError(f"--force-chat: {reason}; name a tokenizer that has one with --tokenizer")
    if reason and not args.raw:
        notes.append(f"this model continues your text instead of answering it: {reason}")
    engine = Engine(
        loaded.model, loaded.tokenizer, dtype=loaded.dtype, kv_dtype=loaded.kv_dtype,
        weights_dtype=loaded.weights_dtype, backend=args.backend, max_batch=1, seed=time.time_ns() % 2**31,
    )  # fmt: skip
    notes.append(engine.describe())
    session = ChatSession(
        engine, loaded.tokenizer, params, engine.max_context, args.system, THINKING[args.think], args.history,
        args.raw or bool(reason),
    )  # fmt: skip
    return session, notes


def _one_shot(args: Args) -> str | None:
    """The text of --prompt or piped to standard input; None for a conversation."""
    if args.prompt is not None:
        return args.prompt
    if sys.stdin is not None and sys.stdin.isatty():
        return None
    text = "" if sys.stdin is None else sys.stdin.read().removeprefix("\ufeff").removesuffix("\n")
    if not text:
        raise ValueError("standard input is empty and not a terminal; pipe a question to it, or use --prompt")
    return text


@dataclass
class ChatSession:
    """A conversation with a model: history, chat template, and one streamed answer at a time.

    engine, tokenizer: those of one model. context: tokens of prompt and answer together. system: None for no system
    message. thinking: the template's enable_thinking; None leaves it out. rounds: of question and answer to keep; None:
    as many as fit. raw: continue the text, without template and history.

    After an answer, `last` is its output (None if it was closed early), `first_after` the seconds from the question to
    the first token, and `dropped` the number of old rounds that were removed to make room.
    """

    engine: Engine
    tokenizer: Tokenizer
    params: SamplingParams
    context: int
    system: str | None = None
    thinking: bool | None = None
    rounds: int | None = None
    raw: bool = False
    messages: list[dict[str, Any]] = field(default_factory=list)
    last: RequestOutput | None = None
    first_after: float = 0.0
    dropped: int = 0

    def reset(self) -> None:
        """Forget the conversation; the system message stays."""
        self.messages.clear()

    def answer(self, text: str) -> Generator[str]:
        """Yields the answer piece by piece, including the reasoning, which ends with </think>. If the generator is
        closed early, the pieces so far are the answer. ValueError if the question is too long or the engine refuses
        it."""
        self.last, self.dropped, self.first_after = None, 0, 0.0
        start = time.perf_counter()
        prompt = self._prompt(text)
        parts: list[str] = []
        deltas = self.engine.stream([Request(prompt, self.params)])
        try:
            if self._opens_reasoning:
                parts.append(f"{THINK}\n")  # it is the end of the prompt
                yield parts[0]
            for delta in deltas:
                self.last = delta.output or self.last
                self.first_after = self.first_after or time.perf_counter() - start
                if delta.finish_reason == "error":
                    parts.clear()
                    raise ValueError(self.last.error if self.last else "the engine refused the request")
                if delta.text:
                    parts.append(delta.text)
                    yield delta.text
        finally:
            deltas.close()  # type: ignore[attr-defined]
            if parts and not self.raw:
                self._remember(text, "".join(parts))

    @property
    def _opens_reasoning(self) -> bool:
        return self.thinking is True and not self.raw

    def _remember(self, question: str, answer: str) -> None:
        reply: dict[str, Any] = {"role": "assistant", "content": answer}
        if answer.startswith(THINK):
            reasoning, _, content = answer.removeprefix(THINK).partition(END_THINK)
            reply = {"role": "assistant", "content": content.lstrip("\n"), "reasoning_content": reasoning.strip("\n")}
        self.messages += [{"role": "user", "content": question}, reply]

    def _prompt(self, text: str) -> list[int]:
        """The prompt's token ids. Removes the oldest rounds if the context has no room for them and an answer."""
        if self.raw:
            return self._check_fits([self.tokenizer.bos_token_id, *self.tokenizer.encode(text, allow_special=False)])
        if self.rounds is not None:
            del self.messages[: max(0, len(self.messages) - 2 * self.rounds)]
        longest = self.context - (self.params.max_new_tokens or 1)
        ids = self._render(text)
        while len(ids) > longest and self.messages:
            del self.messages[:2]
            self.dropped += 1
            ids = self._render(text)
        return self._check_fits(ids)

    def _render(self, text: str) -> list[int]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages = [*system, *self.messages, {"role": "user", "content": text}]
        variables: dict[str, Any] = {} if self.thinking is None else {"enable_thinking": self.thinking}
        rendered = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, **variables)
        return self.tokenizer.encode(rendered)

    def _check_fits(self, ids: list[int]) -> list[int]:
        if len(ids) >= self.context:
            raise ValueError(
                f"the text has {len(ids):,} tokens, the context {self.context:,}; shorten it, or use --yarn"
            )
        return ids


@dataclass
class Terminal:
    """The conversation in a terminal. out: stream for answers; notices: stream for everything else."""

    session: ChatSession
    out: TextIO
    notices: TextIO

    def loop(self) -> int:
        """Read and answer questions until /quit or the end of the input; returns the exit status."""
        _enable_paste()
        self.notice("/help lists the commands")
        while True:
            try:
                line = input("> ")
            except EOFError:
                self.notice("")
                return 0
            except KeyboardInterrupt:
                self.notice("\n/quit or Ctrl-D leaves")
                continue
            if line.strip() == "/quit":
                return 0
            if line.startswith("/"):
                self.command(line)
            elif line.strip():
                with _errors_as_notices(self):
                    try:
                        self.say(line)
                    except KeyboardInterrupt:  # outside the answer, or pressed twice during it
                        self.notice("[stopped]")

    def command(self, line: str) -> None:
        """Execute a line that begins with /."""
        name, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        session = self.session
        if name == "/reset":
            session.reset()
            self.notice("conversation forgotten")
        elif name == "/system":
            session.reset()
            session.system = rest or None
            self.notice("system message set" if rest else "no system message")
        elif name == "/think" and rest in ("on", "off", ""):
            session.thinking = THINKING[cast("Literal['on', 'off'] | None", rest or None)]
            self.notice(f"reasoning: {rest or 'left to the model'}")
        elif name == "/help":
            self.notice(HELP)
        else:
            self.notice(f"unknown command {line.strip()!r}; /help lists them")

    def say(self, text: str) -> None:
        """Ask a question and print the answer while it is generated. ValueError if the question cannot be answered."""
        pieces = self.session.answer(text)
        stopped = False
        with _interrupts() as interrupted:
            for piece in pieces:
                self.out.write(printable(piece))
                self.out.flush()
                if interrupted:
                    stopped = True
                    break
            pieces.close()
        self.out.write("\n")
        self.out.flush()
        if self.session.dropped:
            self.notice(f"[the oldest {self.session.dropped} rounds no longer fit the context]")
        self.notice("[stopped]" if stopped else self._figures())

    def _figures(self) -> str:
        output = self.session.last
        if output is None:
            return "[no answer]"
        rate, first = output.tokens_per_second, self.session.first_after
        speed = f", {rate:,.0f} tokens/s" if rate else ""
        cut = "; cut at --max-new-tokens" if output.finish_reason == "length" else ""
        return f"[{output.completion_tokens} tokens{speed}, first after {1e3 * first:,.0f} ms{cut}]"

    def notice(self, text: str) -> None:
        print(text, file=self.notices, flush=True)


@contextmanager
def _errors_as_notices(terminal: Terminal) -> Iterator[None]:
    """Print a ValueError instead of raising it, so that the conversation goes on."""
    try:
        yield
    except ValueError as problem:
        terminal.notice(f"error: {problem}")


def printable(text: str) -> str:
    """`text` with control characters replaced, since a model could control the terminal by them; newlines and tabs
    stay."""
    return "".join(c if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f") else "\ufffd" for c in text)


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A context in which Ctrl-C fills the list instead of raising in the middle of a step; a second one raises as
    usual."""
    caught: list[int] = []

    def note(number: int, frame: object) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, before)


def _enable_paste() -> None:
    """Turn on line editing, and treat pasted lines as one question."""
    with suppress(ImportError):
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")
