"""What a package index shows is whole: a release makes links and addresses for it."""

import importlib.util
import pathlib
import re
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
URL = "https://example.org/someone/jaxsoftmax"


@pytest.fixture(scope="module")
def for_index():
    spec = importlib.util.spec_from_file_location("for_index", ROOT / ".ci/for_index.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_of_the_readme_become_absolute_and_lead_to_files(for_index):
    text = (ROOT / "README.md").read_text("utf-8")
    prepared = for_index.with_absolute_links(text, URL, "v0.1.0")
    targets = re.findall(r"\]\(([^)]*)\)", re.sub("(?s)```.*?```", "", prepared))
    assert len(targets) > 10
    assert [target for target in targets if "://" not in target] == []
    assert f"]({URL}/raw/v0.1.0/docs/images/mappings.svg)" in prepared
    for target in targets:
        path = re.sub(f"^{URL}/(raw|blob)/v0.1.0/", "", target)
        assert "://" in path or (ROOT / path.partition("#")[0]).exists(), target


def test_metadata_get_the_addresses_of_the_repository(for_index):
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    before, after = (tomllib.loads(t) for t in (text, for_index.with_urls(text, URL, "v0.1.0")))
    urls = after["project"].pop("urls")
    assert urls["Source"] == URL
    assert urls["Issues"] == f"{URL}/issues"
    assert after == before


def test_a_tag_of_another_version_is_refused(for_index, monkeypatch):
    monkeypatch.setattr("sys.argv", ["for_index.py", URL, "v99.0.0"])
    with pytest.raises(SystemExit, match=f"the tag must be v{for_index.version()}"):
        for_index.main()


def test_the_citation_and_the_changelog_name_the_version(for_index):
    version = for_index.version()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert headings[:2] == ["Unreleased", version]
