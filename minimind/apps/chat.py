"""Talk to a model in the terminal: `minimind chat`.

    minimind chat                                   the newest run under runs/
    minimind chat --model runs/sft-nano-builtin --system "Answer briefly."
    minimind chat --model pretrain_512.pth --preset minimind2-small --tokenizer FOLDER
    minimind chat --prompt "Why is the sky blue?"   one answer; standard input that is no terminal does the same

A model that was only pretrained, or whose tokenizer has no chat template, continues the text instead of answering it.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal, TextIO, cast

from minimind.inference.conversation import ChatSession
from minimind.inference.decode.ops import Backend
from minimind.inference.engine import Engine
from minimind.inference.loading import ModelArgs, open_model
from minimind.inference.requests import SamplingParams

HELP = """/reset          forget the conversation
/system TEXT    set the system message and forget the conversation; without TEXT none
/think on|off   reason before answering, or not; /think alone leaves it to the model
/help           this
/quit           leave; so does Ctrl-D. Ctrl-C stops an answer"""

THINKING = {"on": True, "off": False, None: None}


@dataclass(frozen=True)
class Args(ModelArgs):
    """Talk to a model in the terminal."""

    prompt: str | None = None
    """Answer this and leave. None: a conversation, or, where standard input is no terminal, what stands there."""
    raw: bool = False
    """Continue the text instead of answering it, as is done where the model was only pretrained."""
    force_chat: bool = False
    """Put the text into the chat template although the model was only pretrained."""
    system: str | None = None
    """System message."""
    think: Literal["on", "off"] | None = None
    """Reason before answering (the template's enable_thinking) or not; None leaves it to the template."""
    history: int | None = None
    """Rounds of question and answer that are remembered; None: as many as the context holds."""
    max_new_tokens: int = 512
    """Longest answer."""
    temperature: float = 0.8
    """0 takes the likeliest token."""
    top_p: float = 0.95
    """Draw from the smallest set of tokens of this probability; 1 from all."""
    top_k: int = 0
    """Draw from so many likeliest tokens; 0 from all."""
    min_p: float = 0.0
    """Leave out tokens less likely than this share of the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that occurred less likely."""
    seed: int | None = None
    """The same seed gives the same answers. None: other ones each time."""
    backend: Backend = "auto"
    """native, the compiled ops; reference, plain PyTorch; auto: native where it is built."""


def main(args: Args) -> int:
    """The exit status. ValueError, one line, for bad input."""
    if args.history is not None and args.history < 0:
        raise ValueError(f"--history {args.history}: counts from 0")
    if args.raw and args.force_chat:
        raise ValueError("--raw and --force-chat: give one of them")
    text = _one_shot(args)
    conversation, notes = open_conversation(args)
    for note in notes:
        print(note, file=sys.stderr)
    if text is not None:
        Terminal(conversation, sys.stdout, sys.stderr).say(text)
        return 0
    return Terminal(conversation, sys.stdout, sys.stdout).loop()


def open_conversation(args: Args) -> tuple[ChatSession, list[str]]:
    """The conversation, and what a user should know before it begins."""
    params = SamplingParams(
        max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p, top_k=args.top_k,
        min_p=args.min_p, repetition_penalty=args.repetition_penalty, seed=args.seed,
    )  # fmt: skip
    opened = open_model(args)
    notes = opened.notes
    reason = ""
    if opened.tokenizer.chat_template is None:
        reason = "its tokenizer has no chat template"
    elif opened.stage == "pretrain" and not args.force_chat:
        reason = "it was only pretrained (--force-chat to ask all the same)"
    if reason and args.force_chat:
        raise ValueError(f"--force-chat: {reason}; name one that has with --tokenizer")
    if reason and not args.raw:
        notes.append(f"this model continues your text, it does not answer: {reason}")
    engine = Engine(
        opened.model, opened.tokenizer, dtype=opened.dtype, kv_dtype=opened.kv_dtype, backend=args.backend,
        max_batch=1, seed=time.time_ns() % 2**31,
    )  # fmt: skip
    notes.append(engine.describe())
    conversation = ChatSession(
        engine, opened.tokenizer, params, engine.max_context, args.system, THINKING[args.think], args.history,
        args.raw or bool(reason),
    )  # fmt: skip
    return conversation, notes


def _one_shot(args: Args) -> str | None:
    """The text of --prompt or of a standard input that is no terminal; None for a conversation."""
    if args.prompt is not None:
        return args.prompt
    if sys.stdin is not None and sys.stdin.isatty():
        return None
    text = "" if sys.stdin is None else sys.stdin.read().removeprefix("\ufeff").removesuffix("\n")
    if not text:
        raise ValueError("standard input is empty and no terminal; give a question there or with --prompt")
    return text


@dataclass
class Terminal:
    """out: where answers go; notices: where everything else does."""

    conversation: ChatSession
    out: TextIO
    notices: TextIO

    def loop(self) -> int:
        """Questions until /quit or the end of the input."""
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
                with suppress_errors(self):
                    try:
                        self.say(line)
                    except KeyboardInterrupt:  # before the answer began, after it ended, or the second one
                        self.notice("[stopped]")

    def command(self, line: str) -> None:
        name, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        conversation = self.conversation
        if name == "/reset":
            conversation.reset()
            self.notice("forgotten")
        elif name == "/system":
            conversation.reset()
            conversation.system = rest or None
            self.notice("system message set" if rest else "no system message")
        elif name == "/think" and rest in ("on", "off", ""):
            conversation.thinking = THINKING[cast("Literal['on', 'off'] | None", rest or None)]
            self.notice(f"reasoning: {rest or 'as the model likes'}")
        elif name == "/help":
            self.notice(HELP)
        else:
            self.notice(f"unknown command {line.strip()!r}; /help lists them")

    def say(self, text: str) -> None:
        """Ask, and print the answer as it comes; ValueError if it cannot be asked."""
        pieces = self.conversation.answer(text)
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
        if self.conversation.dropped:
            self.notice(f"[the oldest {self.conversation.dropped} rounds no longer fit the context]")
        self.notice("[stopped]" if stopped else self._figures())

    def _figures(self) -> str:
        output = self.conversation.last
        if output is None:
            return "[nothing]"
        rate, first = output.tokens_per_second, self.conversation.first_after
        speed = f", {rate:,.0f} tokens/s" if rate else ""
        cut = "; cut at --max-new-tokens" if output.finish_reason == "length" else ""
        return f"[{output.completion_tokens} tokens{speed}, first after {1e3 * first:,.0f} ms{cut}]"

    def notice(self, text: str) -> None:
        print(text, file=self.notices, flush=True)


@contextmanager
def suppress_errors(terminal: Terminal) -> Iterator[None]:
    """In a conversation a question that cannot be asked is no reason to leave."""
    try:
        yield
    except ValueError as problem:
        terminal.notice(f"error: {problem}")


def printable(text: str) -> str:
    """`text` without the control characters by which a model could command the terminal; newlines and tabs stay."""
    return "".join(c if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f") else "\ufffd" for c in text)


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Ctrl-C fills the list instead of raising in the middle of a step; a second one raises as ever."""
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
    """Line editing, and pasted lines as one question rather than one each."""
    with suppress(ImportError):
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")
