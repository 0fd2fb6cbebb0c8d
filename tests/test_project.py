"""The project's own files agree with each other."""

import re
import subprocess
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import certworker

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKS = {"requirements.lock": ["build"], "requirements-dev.lock": ["build", "dev"]}
"""The dependency groups that each lock holds besides the dependencies themselves."""

pytestmark = pytest.mark.check


def read_pins(lock: str) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9-]+)(?:\[[^]]*\])?==(\S+)", (ROOT / lock).read_text(), re.MULTILINE))


def direct_requirements(groups: list[str]) -> Iterator[Requirement]:
    listed = list(PROJECT["project"]["dependencies"])
    for group in groups:
        listed += [entry for entry in PROJECT["dependency-groups"][group] if isinstance(entry, str)]
    return map(Requirement, listed)


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_is_in_step(lock: str) -> None:
    """Every direct dependency is pinned to a version that pyproject.toml allows; else `make lock`."""
    pins = read_pins(lock)

    for requirement in direct_requirements(LOCKS[lock]):
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, requirement
        assert requirement.specifier.contains(version), requirement


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_names_no_index(lock: str) -> None:
    """Whoever installs decides where packages come from; the hashes decide which they are."""
    text = (ROOT / lock).read_text()

    assert "://" not in text
    assert text.count("==") <= text.count("--hash=sha256:")


def test_runtime_lock_is_part_of_the_development_lock() -> None:
    """What is tested is what is shipped, version by version."""
    assert read_pins("requirements.lock").items() <= read_pins("requirements-dev.lock").items()


def test_version_is_one() -> None:
    """The package, its metadata and pyproject.toml say the same."""
    assert metadata.version("certworker") == PROJECT["project"]["version"]
    assert getattr(certworker, "__version__", PROJECT["project"]["version"]) == PROJECT["project"]["version"]


def test_changelog_has_news() -> None:
    """What is not released yet has a chapter, and so has this version once it is released."""
    chapters = re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1:]

    assert chapters[0].startswith("[Unreleased]")
    assert any(line.startswith("- ") for chapter in chapters for line in chapter.splitlines())


def test_no_path_of_a_developer_machine() -> None:
    """Files in git work in every checkout."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    places = re.compile(rf"/(?:hom[e]|User[s])/[a-z]|/roo[t]/|[A-Z]:\\\\User[s]|{re.escape(str(ROOT))}/")
    tracked = [ROOT / name for name in names.split("\0") if name]

    assert [path for path in tracked if path.is_file() and places.search(path.read_text(errors="replace"))] == []
