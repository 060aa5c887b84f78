"""Writing the page all at once or not at all, and finding out beforehand whether it can be."""

import contextlib
import errno
import os
from pathlib import Path

PAGE = "index.html"


def check(folder: Path) -> None:
    """Finds out whether the page can be written, and leaves no trace.

    Args:
      folder: Where the page will go; it need not exist.

    Raises:
      OSError: It cannot be made or written to.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if (folder / PAGE).is_dir():
        raise IsADirectoryError(errno.EISDIR, f"{PAGE} is a folder there", str(folder))
    missing = _missing(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(_temporary(folder), "")
    finally:
        _discard(_temporary(folder), missing)


def write_page(folder: Path, html: str) -> Path:
    """Writes the page; whatever stops it on the way, no half-written file or new folder stays.

    Args:
      folder: Where the page goes; made if it does not exist.
      html: The whole page.

    Returns:
      The page's path.

    Raises:
      OSError: The folder cannot be made or written to, or the disk is full.
    """
    page = folder / PAGE
    temporary = _temporary(folder)
    missing = _missing(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(temporary, html)
        os.replace(temporary, page)
    except BaseException:
        _discard(temporary, missing)
        raise
    return page


def _temporary(folder: Path) -> Path:
    # In the same folder, hence on the same disk: only there does os.replace swap files at once.
    return folder / f".{PAGE}.{os.getpid()}"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _missing(folder: Path) -> list[Path]:
    """Which folders have to be made, innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def _discard(file: Path, folders: list[Path]) -> None:
    with contextlib.suppress(OSError):
        file.unlink()
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
