"""Starts of Python scripts without their imports: each is a fork of one process that imported them before.

Importing PyTorch and what the stages need of it takes two to three seconds, a fork some milliseconds. Arguments,
environment, working directory, streams and signals are the child's own, so `kill -9` and Ctrl-C are the real ones. Not
for a test whose subject is the start itself, nor for one that needs sets to hash with two different seeds. Where there
is no fork (Windows), or with MINIMIND_TEST_COLD=1, every start is a process of its own.

    python -m tests.warm SOCKET    is the process that forks; it ends with the tests that began it
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minimind.utils.display import caption, pyplot
from tests.pictures import skip_rendering

ROOT = Path(__file__).parents[1]
PIPE = subprocess.PIPE
COLD = not hasattr(os, "fork") or os.environ.get("MINIMIND_TEST_COLD") == "1"
AT_START = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONHASHSEED", "LD_PRELOAD")  # read before a fork could set them


class Process:
    """A started script, with the part of subprocess.Popen's interface that the tests use."""

    def __init__(self, connection: socket.socket, outputs: list[Any]) -> None:
        self._connection, self._outputs, self._said = connection, outputs, b""
        self.returncode: int | None = None
        while b"\n" not in self._said:
            self._said += self._receive()
        pid, _, self._said = self._said.partition(b"\n")
        self.pid = int(pid)

    def _receive(self) -> bytes:
        data = self._connection.recv(64)
        if not data:
            raise RuntimeError("the process that forks is gone; MINIMIND_TEST_COLD=1 does without")
        return data

    def poll(self) -> int | None:
        while self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self._said += self._receive()
            if self._said.endswith(b"\n"):
                self.returncode = int(self._said)
                self._connection.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise subprocess.TimeoutExpired("a warm start", timeout or 0)
            select.select([self._connection], [], [], left)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str | None, str | None]:
        """What was written to the streams that are PIPE: they are files, so nobody waits for a reader."""
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        read = []
        for file in self._outputs:
            text = None
            if file is not None:
                file.seek(0)
                text = file.read().decode("utf-8", "replace")
                file.close()
            read.append(text)
        return read[0], read[1]


def popen(
    arguments: Sequence[str],
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
) -> Process | subprocess.Popen:
    """[sys.executable, script, ...] or [sys.executable, "-m", module, ...], started; text where streams are PIPE."""
    environment = dict(os.environ if env is None else env)
    if COLD:
        return subprocess.Popen(arguments, env=environment, cwd=cwd, stdout=stdout, stderr=stderr, text=True)
    assert arguments[0] == sys.executable
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(_server(tuple(environment.get(name) for name in AT_START)))
    outputs = [tempfile.TemporaryFile() if stream == PIPE else None for stream in (stdout, stderr)]  # noqa: SIM115
    with open(os.devnull, "r+b") as nothing:
        streams = [nothing.fileno()]
        for stream, file, own in zip((stdout, stderr), outputs, (1, 2), strict=True):
            default = nothing.fileno() if stream == subprocess.DEVNULL else own
            streams.append(default if file is None else file.fileno())
        if stderr == subprocess.STDOUT:
            streams[2] = streams[1]
        order = {"arguments": list(arguments[1:]), "env": environment, "cwd": str(cwd or os.getcwd())}
        data = json.dumps(order).encode()
        socket.send_fds(connection, [len(data).to_bytes(4, "big")], streams)
        connection.sendall(data)
    return Process(connection, outputs)


def run(
    arguments: Sequence[str], env: Mapping[str, str] | None = None, cwd: Any = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    process = popen(arguments, env, cwd, PIPE, PIPE)
    out, err = process.communicate(timeout=timeout)
    assert process.returncode is not None
    return subprocess.CompletedProcess(list(arguments), process.returncode, out or "", err or "")


@functools.cache
def _server(at_start: tuple[str | None, ...]) -> str:
    """The socket of a process that forks, begun with these values of AT_START."""
    folder = tempfile.mkdtemp(prefix="minimind-warm-")
    address = os.path.join(folder, "socket")
    environment = {k: v for k, v in os.environ.items() if k not in AT_START}
    environment |= {k: v for k, v in zip(AT_START, at_start, strict=True) if v is not None}
    environment["PYTHONPATH"] = str(ROOT)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(address)
    listener.listen(16)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.warm", str(listener.fileno())],
        cwd=ROOT,
        env=environment,
        pass_fds=[listener.fileno()],
        stdin=subprocess.PIPE,
    )
    listener.close()

    def end() -> None:
        process.kill()
        process.wait()
        os.unlink(address)
        os.rmdir(folder)

    atexit.register(end)
    return address


def preload() -> None:
    """Import all that the scripts import, at their tops or later, and fill the caches of the first picture."""
    importlib.import_module("torch._dynamo")  # by the first optimizer

    for script in sorted((ROOT / "train").glob("*.py")):
        runpy.run_path(str(script), run_name="warm")
    plt = pyplot()
    figure, axes = plt.subplots(layout="constrained")
    axes.plot([1, 10], [1, 10], label=caption("0"))
    axes.set_yscale("log")
    axes.legend()
    figure.savefig(io.BytesIO(), format="png")
    plt.close(figure)
    skip_rendering()


def serve(listener: socket.socket) -> list[str]:
    """Fork at every request; returns in the children alone: the arguments of what to run."""
    running: dict[int, socket.socket] = {}
    wake, woken = socket.socketpair()
    for end in (wake, woken):
        end.setblocking(False)
    signal.set_wakeup_fd(woken.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready = select.select([listener, wake, sys.stdin], [], [])[0]
        if sys.stdin in ready:  # closed: the tests are over
            os._exit(0)
        if wake in ready:
            wake.recv(4096)
            _reap(running)
        if listener not in ready:
            continue
        connection, _ = listener.accept()
        size, streams, _, _ = socket.recv_fds(connection, 4, 3)
        data = b""
        while len(data) < int.from_bytes(size, "big"):
            data += connection.recv(1 << 20)
        pid = os.fork()
        if pid == 0:
            for other in (listener, wake, woken, connection, *running.values()):
                other.close()
            return _become(json.loads(data), streams)
        connection.sendall(b"%d\n" % pid)
        running[pid] = connection
        for stream in streams:
            os.close(stream)


def _reap(running: dict[int, socket.socket]) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        connection = running.pop(pid)
        with contextlib.suppress(OSError):  # nobody waits for it any more
            connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
        connection.close()


def _become(order: dict[str, Any], streams: list[int]) -> list[str]:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the job of a shell's background ignores it
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout, sys.stderr = (open(n, mode) for n, mode in enumerate("rww"))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    return order["arguments"]


def main() -> None:
    preload()
    gc.freeze()  # a child's garbage collection then does not touch imported objects, and so does not copy their pages
    arguments = serve(socket.socket(fileno=int(sys.argv[1])))
    status = 1
    try:
        status = _run(arguments)
    except KeyboardInterrupt:
        traceback.print_exc()
        status = 130
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # taking all the imported modules apart would cost a second


def _run(arguments: list[str]) -> int:
    """The exit status of the script or module, which sees itself as the main program."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [path for path in paths if path and path not in sys.path]
    module = arguments[1] if arguments[0] == "-m" else None
    sys.argv = arguments[1:] if module else arguments
    sys.path.insert(0, os.getcwd() if module else str(Path(arguments[0]).parent))
    try:
        if module:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


if __name__ == "__main__":
    main()
