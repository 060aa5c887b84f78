"""Every block of code in the README and the docs runs, and the API pages miss no public name."""

import collections
import contextlib
import io
import itertools
import pathlib
import re
import textwrap

import pytest

import jaxsoftmax as jsm

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("benchmarks", "docs", "notebooks")
PAGES = sorted([*ROOT.glob("*.md"), *(p for f in FOLDERS for p in ROOT.glob(f"{f}/**/*.md"))])
FENCE = re.compile(r"^( *)```(.*)\n((?:.*\n)*?)\1```$", re.M)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")


@pytest.fixture(autouse=True)
def strict_float64(compiled_as_it_comes):
    """Not here: the pages show what readers get."""


def blocks(page):
    """The fenced blocks of a page: language, code on its own lines, and whether text comes next."""
    text = page.read_text("utf-8")
    found = list(FENCE.finditer(text))
    for fence, after in itertools.zip_longest(found, found[1:]):
        code = "\n" * text[: fence.start(3)].count("\n") + textwrap.dedent(fence[3])
        is_next = after is not None and not text[fence.end() : after.start()].strip()
        yield fence[2], code, textwrap.dedent(after[3]) if is_next and after[2] == "text" else None


def run(page):
    """Runs the Python of a page in order, and yields what it prints with what the page shows."""
    names = {"__name__": "__main__"}
    for language, code, shown in blocks(page):
        if language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(code, str(page), "exec"), names)
            yield out.getvalue(), shown


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.thorough] if page.parent != ROOT else [])
        for page in PAGES
    ],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_code_runs_and_prints_what_the_page_shows(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for printed, shown in run(page):
        if shown is not None:
            assert printed == shown


def test_no_code_is_hidden_from_the_test():
    """Python under another name would not run."""
    languages = {(page.name, language) for page in PAGES for language, _, _ in blocks(page)}
    assert {language for _, language in languages} <= {"python", "text", "bash"}
    assert len([name for name, language in languages if language == "python"]) >= 5
    for page in PAGES:
        text = page.read_text("utf-8")
        assert text.count("```") == 2 * len(list(FENCE.finditer(text))), page
        assert ">>>" not in text, page


def test_api_pages_name_each_public_object_once():
    text = "".join(page.read_text("utf-8") for page in ROOT.glob("docs/api/*.md"))
    listed = collections.Counter(re.findall(r"^::: (\S+)$", text, re.M))
    public = {
        f"{module.__name__}.{name}"
        for module in (jsm, jsm.calibration, jsm.plots, jsm.testing)
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_")
        if getattr(value, "__module__", "").startswith(module.__name__)
    }
    assert listed == dict.fromkeys(public, 1)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    for target in LINK.findall(FENCE.sub("", page.read_text("utf-8"))):
        assert (page.parent / target).exists(), target


def test_each_recipe_is_in_the_list_of_recipes_and_on_the_site():
    recipes = {page.name for page in ROOT.glob("docs/recipes/*.md")} - {"README.md"}
    listed = LINK.findall((ROOT / "docs/recipes/README.md").read_text("utf-8"))
    listed = collections.Counter(name for name in listed if "/" not in name)
    assert listed == dict.fromkeys(recipes, 1)
    nav = re.findall(r": recipes/(\S+)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.M)
    assert collections.Counter(nav) == dict.fromkeys(recipes, 1)
