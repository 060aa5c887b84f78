"""What MkDocs does beside its plugins: pages from outside of docs/, links, formulas."""

import posixpath
import re
from html import unescape
from pathlib import Path

from docstrings import linked, public_names
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[2]
# What lies outside of docs/ and is on the site. Pages and pictures keep their paths.
ADOPTED = (
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md"),
    *("notebooks/README.md", "notebooks/*.ipynb"),
    *("benchmarks/README.md", "benchmarks/results/*.md", "benchmarks/results/*.png"),
)
# Their paths in the repository, by their paths on the site.
sources: dict[str, str] = {}


@event_priority(100)
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what does not lie in docs/."""
    for path in sorted(path for pattern in ADOPTED for path in ROOT.glob(pattern)):
        source = path.relative_to(ROOT).as_posix()
        for uri, content in as_files(path, source).items():
            sources[uri] = source
            files.append(File.generated(config, uri, content=content))
    return files


def as_files(path: Path, source: str) -> dict[str, str | bytes]:
    """A file as it is on the site: a notebook becomes a page, not run, and pictures."""
    if path.suffix != ".ipynb":
        return {source: path.read_bytes()}
    text, resources = MarkdownExporter().from_filename(str(path), {"unique_key": path.stem})
    pictures = {f"{path.parent.name}/{name}": data for name, data in resources["outputs"].items()}
    return {source.replace(".ipynb", ".md"): text.replace("![png]", "![Figure]"), **pictures}


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Leads links between files to their pages, and names to the API."""
    uri, names = page.file.src_uri, public_names()
    parts = re.split(r"(^```.*?^```$|^#[^\n]*$)", markdown, flags=re.M | re.S)
    parts[::2] = (linked(relinked(prose, uri), names) for prose in parts[::2])
    return "".join(parts)


LINK = re.compile(r"(?P<text>\[[^\]]*\])\((?!\w+:|#)(?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def relinked(text: str, uri: str) -> str:
    """The links of a page, made for files of the repository, as links on the site."""
    folder = posixpath.dirname(sources.get(uri, f"docs/{uri}"))

    def link(match: re.Match) -> str:
        target = uri_of(posixpath.normpath(posixpath.join(folder, match["target"])))
        if target is None:
            return match["text"][1:-1]
        relative = posixpath.relpath(target, posixpath.dirname(uri))
        return f"{match['text']}({relative}{match['anchor'] or ''})"

    return LINK.sub(link, text)


def uri_of(path: str) -> str | None:
    """Where on the site a file is, or None if it is not there, like the license."""
    pages = {source: uri for uri, source in sources.items() if uri.endswith(".md")}
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path in pages:
        return pages[path]
    return None if path not in sources and (ROOT / path).exists() else path


FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\(?P<open>[(\[])(?P<tex>.*?)\\[)\]]</(?P=tag)>', re.S
)
# What the converter does not know. Brackets that are paired find their size themselves.
REWRITTEN = (
    (r"\\arg\\(min|max)", r"\\operatorname{arg\1}"),
    (r"\\[bB]ig([(\[])", r"\\left\1"),
    (r"\\[bB]ig([)\]])", r"\\right\1"),
    (r"\\[bB]ig", ""),
)


def on_post_page(output: str, **_: object) -> str:
    """TeX becomes MathML, which browsers show themselves."""
    return FORMULA.sub(_mathml, output)


def _mathml(match: re.Match) -> str:
    tex = known = unescape(match["tex"]).strip()
    for pattern, replacement in REWRITTEN:
        known = re.sub(pattern, replacement, known)
    mathml = convert(known, display="block" if match["open"] == "[" else "inline")
    if "\\" in mathml:
        raise ValueError(f"the formula {tex} is not understood: {mathml}")
    return mathml
