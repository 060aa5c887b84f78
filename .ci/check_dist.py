"""Whether a wheel and a source distribution hold what they should: `.ci/check_dist.py dist/`."""

import pathlib
import sys
import tarfile
import zipfile

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "jaxsoftmax"
IN_SDIST = {
    *("README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "pyproject.toml", "PKG-INFO"),
    *("CITATION.cff", "SECURITY.md", "docs/recipes/README.md", ".ci/for_index.py"),
    *("conftest.py", "mkdocs.yml", "tests/conftest.py", "tests/test_docs.py"),
    *("docs/mappings.md", "docs/_site/hooks.py", "docs/images/mappings.svg"),
    *("benchmarks/results/mappings.md", "notebooks/01_softmax.ipynb"),
}
LARGEST = 5_000_000


def package_files() -> set[str]:
    """What the package is made of, here."""
    files = (path for path in PACKAGE.rglob("*") if path.is_file())
    return {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}


def problems_of_wheel(wheel: pathlib.Path) -> list[str]:
    """What the wheel lacks of the package, and what it holds beside it."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = {name for name in names if name.partition("/")[0].endswith(".dist-info")}
    wanted = package_files() | {"jaxsoftmax/py.typed"}
    found = [f"{wheel.name} lacks {name}" for name in sorted(wanted - names)]
    if not any(name.endswith("/licenses/LICENSE") for name in info):
        found.append(f"{wheel.name} lacks the license")
    return found + [f"{wheel.name} holds {name}" for name in sorted(names - info - wanted)]


def problems_of_sdist(sdist: pathlib.Path) -> list[str]:
    """What the source distribution lacks, and what it should not hold."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    found = [f"{sdist.name} lacks {name}" for name in sorted((IN_SDIST | package_files()) - names)]
    litter = ("__pycache__", ".ipynb_checkpoints", "build/", "report/", "dist/")
    found += [f"{sdist.name} holds {n}" for n in sorted(names) if any(x in n for x in litter)]
    if sdist.stat().st_size > LARGEST:
        found.append(f"{sdist.name} is larger than {LARGEST} bytes")
    return found


def main() -> None:
    """Prints what is wrong, and fails if anything is."""
    dist = pathlib.Path(sys.argv[1])
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    found = problems_of_wheel(wheel) + problems_of_sdist(sdist)
    sys.exit("\n".join(found) or 0)


if __name__ == "__main__":
    main()
