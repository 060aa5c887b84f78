"""The examples of pages as files, for type checkers: `.ci/examples.py FOLDER PAGE ...`."""

import pathlib
import re
import sys
import textwrap

FENCE = re.compile(r"^( *)```python\n((?:.*\n)*?)\1```$", re.M)


def code_of(text: str) -> str:
    """The blocks of a page one after the other, on the lines that they have there."""
    code = ""
    for block in FENCE.finditer(text):
        code += "\n" * (text.count("\n", 0, block.start(2)) - code.count("\n"))
        code += textwrap.dedent(block[2])
    return code


def main() -> None:
    """Writes a file per page."""
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for page in map(pathlib.Path, sys.argv[2:]):
        code = code_of(page.read_text("utf-8"))
        (folder / f"{page.stem.lower()}.py").write_text(code, "utf-8")


if __name__ == "__main__":
    main()
