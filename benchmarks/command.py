"""The command line: measures topics, and writes a page with a table and a chart for each."""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import jax

from benchmarks import charts, tables
from benchmarks.environment import Environment
from benchmarks.measuring import Result

RESULTS = Path(__file__).parent / "results"


class Measurable(Protocol):
    """What is done in one step of the progress bar; `measuring.Comparison` is one."""

    operation: str
    size: str

    def measure(self, quick: bool) -> list[Result]:
        """Finds results, in haste if `quick`: then all that counts is that it works."""
        ...


@dataclasses.dataclass(frozen=True)
class Topic:
    """What is measured together, and what is to be said about it.

    Attributes:
      name: of the module, and of the files that are written.
      title: of the page.
      about: what is measured.
      steps: all there is to measure, in tiny sizes if the argument is True.
      panels: what the chart shows.
      notes: why ours loses where it does; written by hand, so look at it when results change.
      size: what the size of a result is, the title of its column.
      missing: why it cannot be measured here, in one sentence; None if it can.
    """

    name: str
    title: str
    about: str
    steps: Callable[[bool], Sequence[Measurable]]
    panels: Sequence[charts.Panel]
    notes: str
    size: str = "size"
    missing: Callable[[], str | None] = lambda: None


def main(topics: Sequence[Topic], arguments: Sequence[str] | None = None) -> None:
    """Measures the topics that the command line asks for."""
    options = _parser(topics).parse_args(arguments)
    out = options.out or (Path(tempfile.mkdtemp()) if options.quick else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_enable_compilation_cache", False)  # compiling is measured
    jax.config.update("jax_disable_most_optimizations", options.quick)
    for topic in topics:
        if topic.name not in options.only:
            continue
        if why := topic.missing():
            print(f"{topic.name}: skipped, {why}", flush=True)
        else:
            start = time.perf_counter()
            page = _measure(topic, out, options.quick)
            print(f"{page}: {time.perf_counter() - start:.0f} s", flush=True)


def _parser(topics: Sequence[Topic]) -> argparse.ArgumentParser:
    names = [topic.name for topic in topics]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=(
            "Measures jaxsoftmax beside its peers on the device that JAX finds, and writes one "
            "page with a table and a chart per topic."
        ),
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=names,
        default=names,
        metavar="TOPIC",
        help=f"these topics (default: all of {', '.join(names)})",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny sizes and one round: shows that everything runs, and no more",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where to write (default: benchmarks/results, a temporary folder with --quick)",
    )
    return parser


def _measure(topic: Topic, out: Path, quick: bool) -> Path:
    from tqdm import tqdm

    environment = Environment()
    results: list[Result] = []
    with tqdm(topic.steps(quick), topic.name, leave=False) as progress:
        for step in progress:
            progress.set_postfix_str(f"{step.operation}, {step.size}")
            results += step.measure(quick)
            if not quick:
                jax.clear_caches()  # of what was traced too, which would be compiled sooner
    environment.finish()
    charts.save(out / f"{topic.name}.png", topic.panels, results)
    page = out / f"{topic.name}.md"
    page.write_text(_page(topic, results, environment), encoding="utf-8")
    return page


def _page(topic: Topic, results: Sequence[Result], environment: Environment) -> str:
    return f"""\
# {topic.title}

{topic.about.strip()}

![{topic.title}]({topic.name}.png)

Written by `python -m benchmarks --only {topic.name}`.
[The introduction](../README.md) says how to read it.

{tables.rows(environment.rows.items())}

## Results

{tables.table(results, topic.size)}

## Where it loses, and why

{tables.losses(results)}

{topic.notes.strip()}
"""
