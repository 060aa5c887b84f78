"""Prepares a checkout for a release: `.ci/for_index.py URL TAG`, with the URL of the repository.

A package index shows the README alone, so links to files of the repository must be absolute there.
Where the repository is, only the place that releases it knows. So the URL is not written down in
the repository: the workflow `release.yml` passes its own. This script writes it into the links of
the README and into the metadata, and fails if the tag is not that of the package's version.
"""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parents[1]
# Links and pictures, but not those that are absolute, nor anchors.
LINK = re.compile(r"(?P<picture>!?)(?P<text>\[[^\]]*\])\((?!\w+:|#)(?P<target>[^)\s]+)\)")


def with_absolute_links(readme: str, url: str, tag: str) -> str:
    """The README with links that work anywhere."""

    def link(match: re.Match) -> str:
        kind = "raw" if match["picture"] else "blob"
        return f"{match['picture']}{match['text']}({url}/{kind}/{tag}/{match['target']})"

    return LINK.sub(link, readme)


def with_urls(pyproject: str, url: str, tag: str) -> str:
    """The metadata with the addresses that an index shows beside the README."""
    urls = {
        "Homepage": url,
        "Source": url,
        "Issues": f"{url}/issues",
        "Documentation": f"{url}/tree/{tag}/docs",
        "Changelog": f"{url}/blob/{tag}/CHANGELOG.md",
    }
    lines = "".join(f'{name} = "{address}"\n' for name, address in urls.items())
    head, table, tail = pyproject.partition("[project.optional-dependencies]\n")
    return f"{head}[project.urls]\n{lines}\n{table}{tail}"


def version() -> str:
    """The version of the package."""
    text = (ROOT / "jaxsoftmax" / "__init__.py").read_text("utf-8")
    return re.search('^__version__ = "(.*)"$', text, re.M)[1]


def main() -> None:
    """Writes the files."""
    url, tag = sys.argv[1].rstrip("/"), sys.argv[2]
    if tag != f"v{version()}":
        sys.exit(f"the tag must be v{version()}, the version of the package, got {tag}.")
    for name, prepared in {"README.md": with_absolute_links, "pyproject.toml": with_urls}.items():
        path = ROOT / name
        path.write_text(prepared(path.read_text("utf-8"), url, tag), "utf-8")


if __name__ == "__main__":
    main()
