"""A decoder in a process of its own: its memory is its own, and its threads are no one else's."""

from __future__ import annotations

import multiprocessing
import signal
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from bench.common.timing import first_line, peak_mib, start_deaf
from bench.decoding.implementations import PEERS, DecodeSetting, Generation


class DecoderError(Exception):
    """A decoder died; the message is the first line of what it said."""


def work(name: str, setting: DecodeSetting, pipe: Connection) -> None:
    """Given prompts, answers with a Generation; given None, with its peak memory in MiB."""
    torch.set_num_threads(setting.threads)
    try:
        with torch.inference_mode():
            decode = PEERS[name].make(setting)
            pipe.send("ready")
            while (prompts := pipe.recv()) is not None:
                pipe.send(decode(torch.tensor(prompts)))
        pipe.send(peak_mib(setting.device))
    except EOFError:  # the one who asked is gone
        return
    except Exception as problem:  # a decoder that dies is a result, not the end of the run
        pipe.send(DecoderError(first_line(problem)))


class DecodeWorker:
    """That process, as this one sees it. Every method raises DecoderError where the decoder died."""

    def __init__(self, name: str, setting: DecodeSetting) -> None:
        context = multiprocessing.get_context("spawn")
        self.name, self.turns = name, list[Generation]()
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(name, setting, theirs), daemon=True)
        start_deaf(self.process)
        theirs.close()  # so that a dead worker is an end of file here
        self.peak_mib: float | None = None

    def ready(self) -> None:
        self._recv()

    def run(self, prompts: Tensor) -> Generation:
        self._send(prompts.tolist())
        return self._recv()

    def finish(self) -> None:
        self._send(None)
        self.peak_mib = self._recv()
        self.process.join()

    def _send(self, request: Any) -> None:
        try:
            self.pipe.send(request)
        except OSError:  # it died while others had their turn
            raise DecoderError(self._death()) from None

    def _recv(self) -> Any:
        try:
            answer = self.pipe.recv()
        except (EOFError, OSError):
            raise DecoderError(self._death()) from None
        if isinstance(answer, DecoderError):
            raise answer
        return answer

    def _death(self) -> str:
        self.process.join(10)
        status = self.process.exitcode or 0
        names = {number.value: number.name for number in signal.Signals}
        how = f"died by {names.get(-status, f'signal {-status}')}" if status < 0 else "its process died"
        memory = status >= 0 or how.endswith("SIGKILL")  # as the kernel ends who takes too much
        return f"{how}; if memory ran out, take a smaller --batch" if memory else how
