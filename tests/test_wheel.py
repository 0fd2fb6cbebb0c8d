"""What `pip install .` brings is whole: the wheel is built, installed apart from the checkout, and run."""

import os
import stat
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from certworker.store.database import SCHEMA_REVISION

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built by its own build backend without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with certworker from the wheel and its dependencies from the running environment.

    The running environment's own certworker, a link to the checkout, is not there: its .pth file counts in
    its own site-packages only.
    """
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-I", "-c", where], check=True, capture_output=True, text=True).stdout.strip())
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def run(python: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("CERTWORKER_", "PYTHON"))}
    return subprocess.run([python, "-I", *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


CLI = ("-c", "from certworker.cli.main import main; main()")


def test_the_wheel_holds_the_program_and_nothing_else(wheel: Path) -> None:
    """Migrations inside the package, no tests, no folder of its own beside it; the command is named."""
    names = zipfile.ZipFile(wheel).namelist()
    revisions = [path.name for path in (ROOT / "migrations" / "versions").glob("*.py")]

    assert {name.split("/")[0] for name in names} == {"certworker", f"certworker-{_version(wheel)}.dist-info"}
    for revision in revisions:
        assert f"certworker/migrations/versions/{revision}" in names
    assert "certworker/migrations/env.py" in names
    assert not [name for name in names if "tests" in name or name.endswith((".pyc", ".db", ".pem", "kek"))]
    (entry,) = (name for name in names if name.endswith("entry_points.txt"))
    assert "certworker = certworker.cli.main:main" in zipfile.ZipFile(wheel).read(entry).decode()


def _version(wheel: Path) -> str:
    return wheel.name.split("-")[1]


def test_init_works_from_the_wheel_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    """Database, key and schema are made by code that lies in the new environment."""
    made = run(installed, tmp_path, *CLI, "init")

    assert made.returncode == 0, made.stderr
    data = tmp_path / ".certworker"
    assert {path.name for path in data.iterdir()} >= {"certworker.db", "kek"}
    assert stat.S_IMODE((data / "kek").stat().st_mode) == 0o600
    assert stat.S_IMODE((data / "certworker.db").stat().st_mode) == 0o600
    assert stat.S_IMODE(data.stat().st_mode) == 0o700
    checked = run(installed, tmp_path, *CLI, "db", "check")
    assert checked.stdout.strip() == f"schema {SCHEMA_REVISION} fits"
    assert run(installed, tmp_path, *CLI, "init").stdout.strip() == "nothing to do: everything is there"


def test_nothing_of_the_checkout_is_used(installed: Path, tmp_path: Path) -> None:
    """The package and its migrations come from the wheel: the checkout is not even on the path."""
    ask = "import certworker, sys; from certworker.store.schema import migrations_folder; "
    ask += "print(certworker.__file__, migrations_folder(), *sys.path, sep='\\n')"
    answered = run(installed, tmp_path, "-c", ask)
    package, migrations, *path = map(Path, answered.stdout.splitlines())

    assert answered.returncode == 0, answered.stderr
    site = package.parents[1]
    assert site.is_relative_to(installed.parents[1])
    assert migrations == site / "certworker" / "migrations"
    assert ROOT not in path


def test_a_wheel_without_its_migrations_would_fail(installed: Path, tmp_path: Path) -> None:
    """Why the tests above mean something: nothing else is found in their place."""
    ask = "import certworker.store.schema as s; print(s.migrations_folder())"
    folder = Path(run(installed, tmp_path, "-c", ask).stdout.strip())
    hidden = folder.with_name("hidden")
    folder.rename(hidden)
    try:
        failed = run(installed, tmp_path, *CLI, "init")
    finally:
        hidden.rename(folder)

    assert failed.returncode == 1
    assert failed.stderr.count("\n") == 1
    assert "this installation is incomplete, install certworker again" in failed.stderr
