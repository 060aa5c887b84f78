"""Executes the notebooks, each in a fresh kernel: `python notebooks/run.py [01 ...]`.

A cell that fails, writes a warning or runs out of time fails the run. So does a notebook that is
not stored as it should be: executed from top to bottom, with the outputs that the run gives (their
numbers may differ), small figures and no trace of the machine. `--write` stores what the run gives.
"""

import argparse
import concurrent.futures
import copy
import pathlib
import re
import sys
import time

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

HERE = pathlib.Path(__file__).parent
INSTALL = """import importlib.util

if importlib.util.find_spec("jaxsoftmax") is None:  # else it is installed, and stays as it is
    %pip install -q "..[notebooks]\""""
LAST_HEADING = "## What to try next"
LIMIT_S = 600
LARGEST_IMAGE = 150_000
COLOR = re.compile(r"\x1b\[[0-9;]*m")
LOCAL_PATH = re.compile(r"(^|[\s'\"=(])(/(home|root|tmp|usr|work|Users)/|[A-Z]:\\)")


def execute(notebook: NotebookNode) -> NotebookNode:
    """The notebook with the outputs of this run."""
    notebook = copy.deepcopy(notebook)
    deadline = time.monotonic() + LIMIT_S
    NotebookClient(
        notebook,
        kernel_name="python3",
        timeout_func=lambda _: max(1, int(deadline - time.monotonic())),
        record_timing=False,
        coalesce_streams=True,
        # What XLA logs when a machine is slow goes to the terminal, and fails nothing.
        extra_arguments=["--IPKernelApp.log_level=ERROR", "--IPKernelApp.capture_fd_output=False"],
        resources={"metadata": {"path": str(HERE)}},
    ).execute()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def problems(notebook: NotebookNode) -> list[str]:
    """What is wrong with an executed notebook."""
    code = _code(notebook)
    found = []
    if code[0].source != INSTALL:
        found.append(f"its first cell of code is not\n{INSTALL}")
    if not notebook.cells[-1].source.startswith(LAST_HEADING):
        found.append(f"its last cell does not start with {LAST_HEADING!r}")
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("it was not executed from top to bottom")
    for cell in code:
        for output in cell.outputs:
            problem = _problem(output)
            if problem:
                found.append(f"cell {cell.execution_count} {problem}")
    return found


def _problem(output: NotebookNode) -> str | None:
    if output.output_type == "error":
        return f"fails: {output.ename}: {output.evalue}"
    if output.get("name") == "stderr":
        return f"writes to stderr: {output.text.strip()}"
    data = output.get("data", {})
    if len(data.get("image/png", "")) * 3 / 4 > LARGEST_IMAGE:
        return f"holds an image of more than {LARGEST_IMAGE // 1000} kB"
    text = output.get("text", "") + data.get("text/plain", "") + data.get("text/html", "")
    path = LOCAL_PATH.search(text)
    return None if path is None else f"shows a path of a machine: {path.group().strip()}"


def _differences(stored: NotebookNode, executed: NotebookNode) -> list[str]:
    """Which cells have outputs of other kinds; numbers may differ."""
    return [
        f"cell {new.execution_count} lacks the outputs that it gives, or has others"
        for old, new in zip(_code(stored), _code(executed), strict=True)
        if _kinds(old) != _kinds(new)
    ]


def _kinds(cell: NotebookNode) -> list[tuple[str, ...]]:
    return [(output.output_type, *sorted(output.get("data", {}))) for output in cell.outputs]


def _code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def run(path: pathlib.Path, write: bool) -> list[str]:
    """Executes a notebook, and gives what is wrong with it."""
    stored = nbformat.read(path, as_version=4)
    try:
        executed = execute(stored)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        return [COLOR.sub("", str(error))]
    found = problems(executed)
    if not write:
        stale = problems(stored) or _differences(stored, executed)
        return found + [f"as stored, {problem}" for problem in stale]
    if not found:
        nbformat.write(executed, path)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Runs the notebooks that are named, or all; the exit status is 1 if something is wrong."""
    parser = argparse.ArgumentParser(description="Executes the notebooks.")
    parser.add_argument("names", nargs="*", help="how a notebook's name starts; default: all")
    parser.add_argument("--write", action="store_true", help="store the outputs")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time; default: 1")
    options = parser.parse_args(arguments)
    paths = sorted(HERE.glob("*.ipynb"))
    if options.names:
        paths = [path for path in paths if path.name.startswith(tuple(options.names))]
    if not paths:
        parser.error(f"no notebook has a name that starts with {' or '.join(options.names)}")

    def timed(path: pathlib.Path) -> tuple[list[str], float]:
        start = time.monotonic()
        return run(path, options.write), time.monotonic() - start

    failed = False
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for path, (found, seconds) in zip(paths, pool.map(timed, paths), strict=True):
            verdict = "failed" if found else "ok"
            print(f"{path.name}: {verdict}, {seconds:.0f} s", flush=True)
            for problem in found:
                print(f"  {problem}", file=sys.stderr)
            failed = failed or bool(found)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
