"""A crash of someone else's native code is one clear message, in tests, in bench/decode.py and in the export."""

import ctypes
import operator
import os
import signal
import sys
import time

import pytest

from bench import decode
from bench.common.worker import ImplementationError, Worker
from bench.decode import Args
from minimind.export import gguf
from tests import foreign

CRASH = "import sys, ctypes; print('a last word', file=sys.stderr, flush=True); ctypes.string_at(0)"


def test_an_answer_comes_back_and_what_is_printed_is_none():
    assert foreign.call("arithmetic", operator.add, 2, 3) == 5
    assert foreign.call("noise", print, "5") is None


def test_a_crash_is_an_assertion_and_not_the_end():
    with pytest.raises(AssertionError, match=r"^llama\.cpp died by SIGSEGV \(") as caught:
        foreign.call("llama.cpp", ctypes.string_at, 0)
    assert "Segmentation fault" in str(caught.value) and "in string_at" in str(caught.value)


def test_an_exception_and_a_hang_are_assertions():
    with pytest.raises(AssertionError, match=r"(?s)^llama\.cpp failed \(.*ValueError: invalid literal.*\)$"):
        foreign.call("llama.cpp", int, "x")
    with pytest.raises(AssertionError, match=r"^llama\.cpp was not done after 0\.5 s$"):
        foreign.call("llama.cpp", time.sleep, 60, timeout=0.5)


def test_a_crashing_quantizer_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "quantizer", lambda: [sys.executable, "-c", CRASH])
    with pytest.raises(ValueError, match=r"quantizer failed: died by SIGSEGV \(a last word\)$") as caught:
        gguf.quantize(tmp_path / "m.f32", tmp_path / "m.gguf")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(gguf, "quantizer", lambda: [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(ValueError, match=r"quantizer failed \(no message\)$"):
        gguf.quantize(tmp_path / "m.f32", tmp_path / "m.gguf")


@pytest.mark.heavy
def test_a_crashing_decoder_is_a_row_and_the_others_go_on(tmp_path, monkeypatch, capfd):
    crashed: list[Worker] = []

    class Crashing(Worker):
        def __init__(self, start, name, setting):
            super().__init__(start, name, setting)
            self.name = name

        def ask(self, request):
            if self.name == "naive":
                crashed.append(self)
                self.wait_until_ready()
                os.kill(self.process.pid or 0, signal.SIGSEGV)
            return super().ask(request)

    monkeypatch.setattr(decode, "Worker", Crashing)
    arguments = Args(
        preset="nano", peer=("naive", "ours-reference"), batch=(1,), prompt=4, new=3, turns=1, threads=1,
        device="cpu", out=str(tmp_path),
    )  # fmt: skip
    dead, good = decode.main(arguments)["rows"]
    assert dead["status"] == "failed" and dead["reason"] == "died by SIGSEGV" and dead["tpot"] is None
    assert good["status"] == "ok" and good["turns"] == 1
    assert "batch 1: naive failed: died by SIGSEGV" in capfd.readouterr().err
    with pytest.raises(ImplementationError, match=r"^died by SIGSEGV$"):  # also after its turn
        Worker.ask(crashed[0], None)
