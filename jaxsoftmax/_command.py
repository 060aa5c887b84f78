"""What the demonstrations have in common as commands: what goes wrong is told in one line."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

FAILED, BAD_USAGE, INTERRUPTED = 1, 2, 130


class CommandError(Exception):
    """What is wrong, in one line."""

    status = FAILED


class UsageError(CommandError):
    """What the user can put right."""

    status = BAD_USAGE


class Parser(argparse.ArgumentParser):
    """A parser whose errors are errors of usage."""

    def error(self, message: str) -> NoReturn:
        """Tells what is wrong with the options."""
        raise UsageError(message)


def status_of(command: Callable[[], None]) -> int:
    """Runs the command. Returns 0, the status of its error, or 130 after Ctrl-C."""
    try:
        command()
    except CommandError as error:
        complain(error)
        return error.status
    except KeyboardInterrupt:
        complain("interrupted")
        return INTERRUPTED
    return 0


def complain(error: object) -> None:
    """Says on standard error what is wrong, in one line."""
    print("jaxsoftmax:", " ".join(str(error).split()), file=sys.stderr, flush=True)
