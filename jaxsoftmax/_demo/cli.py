"""The command line: options, what is said on screen, and how it ends."""

import argparse
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxsoftmax._command import Parser, UsageError, status_of
from jaxsoftmax._demo import folder, interrupts
from jaxsoftmax._demo.models import MODELS, Model

_EXTRAS = ("sklearn", "matplotlib", "tqdm")
_MOST_EPOCHS = 10_000
_LARGEST_SEED = 2**31 - 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demonstration.

    Args:
      arguments: The command line without the program's name; by default, the process's own.

    Returns:
      The exit status: 0, or 2 for what the user can put right, or 130 after Ctrl-C.
    """
    return status_of(lambda: _run(_parser().parse_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m jaxsoftmax",
        description=(
            "Trains one small network per mapping to read handwritten digits, says which mapping "
            "and which scaling give the best probabilities, and writes a page about it."
        ),
        allow_abbrev=False,
    )
    parser.add_argument(
        "--mapping",
        action="append",
        choices=[model.name for model in MODELS],
        help="train only this one; you may give several (default: all)",
    )
    parser.add_argument(
        "--epochs",
        type=_whole_number(1, _MOST_EPOCHS),
        default=200,
        metavar="N",
        help="passes over the training digits (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=_whole_number(0, _LARGEST_SEED),
        default=0,
        metavar="N",
        help="seed of all random numbers: same seed, same results (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=_folder,
        default=Path("report"),
        metavar="FOLDER",
        help="where the page goes (default: %(default)s)",
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    return parser


def _whole_number(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or not least <= number <= most:
            raise argparse.ArgumentTypeError(
                f"must be a whole number from {least} to {most}, not {text!r}"
            )
        return number

    return parse


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("must name a folder, not ''")
    return Path(text)


def _run(options: argparse.Namespace) -> None:
    chosen = [model for model in MODELS if model.name in (options.mapping or (model.name,))]
    try:
        folder.check(options.out)
    except OSError as error:
        raise _unwritable(options.out, error) from error
    try:
        _demonstrate(chosen, options)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRAS:
            raise
        raise UsageError(
            f'this needs {error.name}, which is not installed: pip install "jaxsoftmax[demo]"'
        ) from error


def _demonstrate(models: list[Model], options: argparse.Namespace) -> None:
    say = (lambda text: None) if options.quiet else print
    with interrupts.held() as let_through:
        # Here, not above: only these modules need the extra, and a wrong option is told faster.
        from jaxsoftmax._demo import comparison, digits, page, table, verdict, wording

        let_through()
        data = digits.load(options.seed)
        say(
            f"{data.train.size} handwritten digits to train on, {data.validation.size} to fit the "
            f"scalings on, {data.test.size:,} to test."
        )
        results = comparison.compare(
            models,
            data,
            epochs=options.epochs,
            seed=options.seed,
            quiet=options.quiet,
            checkpoint=let_through,
        )
        ranking = verdict.rank(results)
        html = page.page(results, ranking, data, epochs=options.epochs, seed=options.seed)
    try:
        path = folder.write_page(options.out, html)
    except OSError as error:
        raise _unwritable(options.out, error) from error
    said = textwrap.fill(" ".join(wording.verdict(ranking)), 80)
    say(f"\n{table.table(results)}\n\n{said}\n\nThe page is at {path}")


def _unwritable(out: Path, error: OSError) -> UsageError:
    return UsageError(f"cannot write to --out {out}: {error.strerror or error}")
