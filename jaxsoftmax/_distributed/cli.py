"""The command line: options, what is said on screen, and how it ends."""

import argparse
import os
import sys
from collections.abc import Sequence

from jaxsoftmax._command import FAILED, INTERRUPTED, Parser, UsageError, complain, status_of
from jaxsoftmax._distributed import launch


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demonstration.

    Args:
      arguments: the command line without the program's name; by default, the process's own.

    Returns:
      The exit status: 0, or 1 if a process failed, 2 for what the user can put right, 130 after
      Ctrl-C.
    """
    return status_of(lambda: _run(_parser().parse_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m jaxsoftmax.distributed_demo",
        description=(
            "Trains a small model of characters with several processes: rows of a batch over the "
            "processes, classes of the last layer over the devices of each. Compares the losses "
            "with those of one device."
        ),
        epilog=(
            "On a cluster, start it once on each machine with --coordinator, --process-id and "
            "--num-processes; each process takes the devices that JAX finds there."
        ),
        allow_abbrev=False,
    )
    parser.add_argument(
        "--processes", type=int, metavar="N", help="processes to start here (default: 2)"
    )
    parser.add_argument(
        "--devices", type=int, metavar="N", help="CPU devices of each of them (default: 4)"
    )
    parser.add_argument(
        "--steps", type=int, default=30, metavar="N", help="steps of training (default: 30)"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="end all processes after that long (default: 600)",
    )
    cluster = parser.add_argument_group("one process of a cluster")
    cluster.add_argument(
        "--coordinator", metavar="HOST:PORT", help="where process 0 is to be reached"
    )
    cluster.add_argument(
        "--process-id", type=int, metavar="I", help="which process this is, from 0"
    )
    cluster.add_argument("--num-processes", type=int, metavar="N", help="how many there are")
    return parser


def _run(options: argparse.Namespace) -> None:
    _check_least("--steps", options.steps, 1)
    cluster = {
        "--coordinator": options.coordinator,
        "--process-id": options.process_id,
        "--num-processes": options.num_processes,
    }
    here = {
        "--processes": options.processes,
        "--devices": options.devices,
        "--timeout": options.timeout,
    }
    if all(value is None for value in cluster.values()):
        wanted = {"--processes": 2, "--devices": 4, "--timeout": 600.0}
        wanted |= {name: value for name, value in here.items() if value is not None}
        for name, value in wanted.items():
            _check_least(name, value, 1)
        launch.run(wanted["--processes"], wanted["--devices"], options.steps, wanted["--timeout"])
        return
    for name, value in cluster.items():
        if value is None:
            raise UsageError(f"{name} is needed for one process of a cluster")
    for name, value in here.items():
        if value is not None:
            raise UsageError(f"{name} does not go with --coordinator")
    host, _, port = options.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f"--coordinator must be HOST:PORT, not {options.coordinator!r}")
    _check_least("--num-processes", options.num_processes, 1)
    if not 0 <= options.process_id < options.num_processes:
        most = options.num_processes - 1
        raise UsageError(f"--process-id must be from 0 to {most}, not {options.process_id}")
    _work(options)


def _check_least(name: str, value: float, least: int) -> None:
    if not value >= least:
        raise UsageError(f"{name} must be at least {least}, not {value:g}")


def _work(options: argparse.Namespace) -> None:
    if os.environ.get(launch.CHILD):
        launch.end_with_parent()
    # Here, not above: a wrong option is reported before JAX is imported.
    from jaxsoftmax._distributed import worker

    status = FAILED
    try:
        worker.run(options.coordinator, options.process_id, options.num_processes, options.steps)
        status = 0
    except KeyboardInterrupt:
        complain("interrupted")
        status = INTERRUPTED
    except Exception as error:
        # JAX's first line says it, be it that another process is gone.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        complain(f"process {options.process_id} cannot go on: {lines[0]}")
    # JAX would wait for the other processes, which may be gone.
    sys.stdout.flush()
    os._exit(status)
