"""Starts the processes on this machine, and sees to it that all of them end."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import IO, NamedTuple, NoReturn

from jaxsoftmax._command import CommandError

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 5.0
CHILD = "JAXSOFTMAX_DEMO_CHILD"


class RunError(CommandError):
    """Why the run ended before its time."""


class _Process(NamedTuple):
    number: int
    popen: subprocess.Popen
    errors: IO[bytes]


def run(num_processes: int, num_devices: int, num_steps: int, timeout: float) -> None:
    """Runs the processes to their end.

    Raises:
      RunError: if one of them fails or is killed, or the time is up. None is left running.
    """
    deadline = time.monotonic() + timeout
    with contextlib.ExitStack() as stack:
        coordinator = f"127.0.0.1:{_free_port()}"
        processes = [
            stack.enter_context(_started(i, coordinator, num_processes, num_devices, num_steps))
            for i in range(num_processes)
        ]
        pids = " ".join(str(process.popen.pid) for process in processes)
        print(f"Started {num_processes} processes, one killed ends all: {pids}", flush=True)
        while any(process.popen.poll() is None for process in processes):
            _check(processes)
            if time.monotonic() > deadline:
                raise RunError(f"not done after --timeout {timeout:g} seconds; all were ended")
            time.sleep(_POLL_SECONDS)
        _check(processes)


@contextlib.contextmanager
def _started(
    number: int, coordinator: str, num_processes: int, num_devices: int, num_steps: int
) -> Iterator[_Process]:
    command = [sys.executable, "-m", "jaxsoftmax.distributed_demo", f"--coordinator={coordinator}"]
    command += [
        f"--process-id={number}",
        f"--num-processes={num_processes}",
        f"--steps={num_steps}",
    ]
    flags = f"--xla_force_host_platform_device_count={num_devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, CHILD: "1"}
    with tempfile.TemporaryFile() as errors:
        # In a session of its own, for Ctrl-C to reach this process alone; it ends the others. The
        # pipe tells them, too, when this process is gone.
        popen = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stderr=errors,
            env=environment,
            start_new_session=True,
        )
        try:
            yield _Process(number, popen, errors)
        finally:
            _end(popen)


def _end(popen: subprocess.Popen) -> None:
    if popen.poll() is None:
        popen.terminate()
        try:
            popen.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            popen.kill()
    popen.wait()
    if popen.stdin is not None:
        popen.stdin.close()


def _check(processes: list[_Process]) -> None:
    failed = [process for process in processes if process.popen.poll()]
    if not failed:
        return
    # Who was killed has brought down who failed.
    failed.sort(key=lambda process: process.popen.returncode >= 0)
    first = failed[0]
    code = first.popen.returncode
    name = f"process {first.number} of {len(processes)}"
    if code < 0:
        raise RunError(f"{name} was killed by {signal.Signals(-code).name}; the others were ended")
    raise RunError(f"{name} failed: {_last_line(first.errors) or f'exit status {code}'}")


def _last_line(errors: IO[bytes]) -> str:
    errors.seek(0)
    lines = errors.read().decode(errors="replace").split("\n")
    ours = [line for line in lines if line.startswith("jaxsoftmax: ")] or lines
    return next((line.removeprefix("jaxsoftmax: ") for line in reversed(ours) if line.strip()), "")


def end_with_parent() -> None:
    """Ends this process when the one that started it is gone: its end of the pipe is closed."""

    def watch() -> NoReturn:
        sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
