"""Text of this repository as Markdown for the site.

In docstrings formulas are reST (`.. math::` and `:math:`), which editors and `help` show well, and
names of this package are code. Here formulas become TeX between dollars, and names become links.
"""

import re
import textwrap
from pathlib import Path

import griffe

API = Path(__file__).parents[1] / "api"
MATH_BLOCK = re.compile(r"^(?P<indent> *)\.\. math:: (?P<tex>.*(?:\n(?P=indent) +\S.*)*)", re.M)
MATH_INLINE = re.compile(r":math:`([^`]+)`")
CODE = re.compile(r"(?<![`\[])`(\w+)`(?!`)")
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{5})")
REFERENCES = re.compile(r"^References:\n((?: +.*\n?|\n)*)", re.M)


def public_names() -> dict[str, str]:
    """The paths of all public names, as the pages of the API list them."""
    pages = "".join(page.read_text("utf-8") for page in API.glob("*.md"))
    return {path.rpartition(".")[2]: path for path in re.findall(r"^::: (\S+)$", pages, re.M)}


def linked(text: str, names: dict[str, str]) -> str:
    """Names that are code, such as `softmax`, as links to their place in the API."""
    return CODE.sub(lambda m: f"[{m[0]}][{names[m[1]]}]" if m[1] in names else m[0], text)


def as_markdown(text: str, names: dict[str, str]) -> str:
    """A docstring as Markdown."""
    text = MATH_BLOCK.sub(_display, text)
    text = MATH_INLINE.sub(lambda m: f"${' '.join(m[1].split())}$", text)
    text = ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", linked(text, names))
    text = REFERENCES.sub(lambda m: f"**References:**\n\n{textwrap.dedent(m[1])}\n", text)
    # The section of Google's style whose `>>>` are code is called so.
    return re.sub("^Example:$", "Examples:", text, flags=re.M)


def _display(match: re.Match) -> str:
    indent, tex = match["indent"], " ".join(match["tex"].split())
    return f"{indent}$$\n{indent}{tex}\n{indent}$$"


class Docstrings(griffe.Extension):
    """Rewrites all docstrings of the package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **_: object) -> None:
        """Called by griffe."""
        _rewrite(pkg, public_names())


def _rewrite(parent: griffe.Object, names: dict[str, str]) -> None:
    for member in parent.members.values():
        if isinstance(member, griffe.Alias):
            continue
        if member.docstring:
            parameters = member.parameters if isinstance(member, griffe.Function) else ()
            own = {member.name, *(parameter.name for parameter in parameters)}
            others = {name: path for name, path in names.items() if name not in own}
            member.docstring.value = as_markdown(member.docstring.value, others)
        _rewrite(member, names)
