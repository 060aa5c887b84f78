"""Several processes that train together: their losses, and how they end, in bounded time."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from jaxsoftmax._distributed import cli

SECONDS = 240  # for a slow machine; a run takes 10
COMMAND = [sys.executable, "-u", "-m", "jaxsoftmax.distributed_demo"]


class Demo:
    """The command while it runs."""

    def __init__(self, *options):
        # What starts the tests in the background has them, and all that they start, ignore Ctrl-C.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.popen = subprocess.Popen(
            [*COMMAND, f"--timeout={SECONDS}", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        signal.signal(signal.SIGINT, before)
        self.pids = [int(pid) for pid in re.findall(r"\d+", self.line().partition(": ")[2])]

    def line(self):
        """What it prints next."""
        return self.popen.stdout.readline()

    def end(self):
        """The exit status, and all else that it prints; no process is left."""
        out, err = self.popen.communicate(timeout=SECONDS)
        deadline = time.monotonic() + 30
        while any(map(is_running, self.pids)):
            assert time.monotonic() < deadline, "processes were left running"
            time.sleep(0.1)
        return self.popen.returncode, out, err


def is_running(pid):
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as stat:  # one that ended and was not waited for
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_two_processes_have_the_losses_of_one():
    status, out, err = Demo("--processes=2", "--steps=8").end()
    assert (status, err) == (0, "")
    assert "2 processes, 8 devices: rows over 2, classes over 4." in out
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", out)]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    assert "Equal to the losses of one device" in out


def test_a_killed_process_ends_the_others():
    demo = Demo("--processes=2", "--devices=1", "--steps=1000000")
    while "step" not in demo.line():
        assert demo.popen.poll() is None
    os.kill(demo.pids[1], signal.SIGKILL)
    status, _, err = demo.end()
    assert status == 1
    assert err == "jaxsoftmax: process 1 of 2 was killed by SIGKILL; the others were ended\n"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_nothing_is_left_when_the_command_is_ended(number, status):
    demo = Demo("--devices=1", "--steps=1000000")
    assert len(demo.pids) == 2
    demo.popen.send_signal(number)
    actual, _, err = demo.end()
    assert actual == status
    assert err == ("jaxsoftmax: interrupted\n" if number == signal.SIGINT else "")


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("--processes must be at least 1, not 0", ["--processes=0"]),
        ("--steps must be at least 1, not 0", ["--steps=0"]),
        ("argument --steps: invalid int value: 'x'", ["--steps=x"]),
        ("--process-id is needed for one process of a cluster", ["--coordinator=host:1"]),
        (
            "--process-id must be from 0 to 1, not 2",
            ["--coordinator=host:1", "--num-processes=2", "--process-id=2"],
        ),
        (
            "--coordinator must be HOST:PORT, not 'host'",
            ["--coordinator=host", "--num-processes=2", "--process-id=0"],
        ),
        (
            "--processes does not go with --coordinator",
            ["--coordinator=h:1", "--num-processes=2", "--process-id=0", "--processes=2"],
        ),
    ],
)
def test_wrong_options_are_told_in_one_line(message, options, capsys):
    assert cli.main(options) == 2
    assert capsys.readouterr().err == f"jaxsoftmax: {message}\n"
