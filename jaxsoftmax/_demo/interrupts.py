"""Keeping Ctrl-C out of compiled code."""

import contextlib
import signal
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def held() -> Iterator[Callable[[], None]]:
    """Makes Ctrl-C wait for a good moment.

    An exception that strikes inside JAX may be swallowed, come out as another one, or crash the
    process when it ends. So the first Ctrl-C is only noted, until the end of the block or until
    the function that this gives is called; then it is raised. A second one is raised at once.

    Yields:
      A function that raises a noted Ctrl-C.

    Raises:
      KeyboardInterrupt: if Ctrl-C was noted.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: None  # Someone else decides what Ctrl-C does.
        return
    noted = False

    def note(number: int, frame: object) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True

    def let_through() -> None:
        if noted:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield let_through
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    let_through()
