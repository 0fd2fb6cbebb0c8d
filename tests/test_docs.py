"""The documents say what the program does: settings, commands, rooms, states and errors are the same in both.

A snippet that runs is marked `<!-- runnable: KIND -->` on the line before its fence.
"""

import configparser
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import psycopg
import pytest

from certworker import wiring
from certworker.core import retry
from certworker.core.issuance import State
from certworker.core.retry import Endpoint, ErrorClass, Failure, Scope, classify_problem, retry_at
from certworker.errors import Problem
from certworker.settings import PREFIX, Settings, load
from certworker.store import schema

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
ERRORS = (ROOT / "docs" / "decisions" / "errors.md").read_text()

_SNIPPET = re.compile(r"^<!-- runnable: (\w+) -->\n```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_CELL = re.compile(r"(?<!\\)\|")


def snippets(*kinds: str) -> list[Any]:
    found = ((path, *match) for path in DOCUMENTS for match in _SNIPPET.findall(path.read_text()))
    return [
        pytest.param(text, id=f"{path.stem}-{number}")
        for number, (path, kind, text) in enumerate(found)
        if kind in kinds
    ]


def table(text: str, head: str) -> Iterator[list[str]]:
    """Give the rows of the table with this heading, cell by cell."""
    lines = iter(text.split(f"\n{head}\n", 1)[1].splitlines()[1:])
    for line in lines:
        if not line.startswith("|"):
            return
        yield [cell.strip().replace("\\|", "|") for cell in _CELL.split(line)[1:-1]]


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def block(text: str, name: str) -> list[str]:
    """Give the lines of the fence after `<!-- name -->`."""
    return text.split(f"<!-- {name} -->\n```\n", 1)[1].split("\n```", 1)[0].splitlines()


# -- links and words --------------------------------------------------------------------------------


@pytest.mark.check
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    """Every relative link names a file of the checkout, and its part a heading of it."""
    for link in _LINK.findall(path.read_text()):
        if "://" in link:
            continue
        name, _, part = link.partition("#")
        target = (path.parent / name).resolve() if name else path

        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not part or part in headings(target), link


def headings(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.check
def test_every_document_is_linked() -> None:
    """What nobody can find is not written."""
    linked = {
        (path.parent / link.partition("#")[0]).resolve()
        for path in DOCUMENTS
        for link in _LINK.findall(path.read_text())
        if "://" not in link
    }
    entrances = {ROOT / name for name in ("README.md", "CHANGELOG.md")}

    assert set(DOCUMENTS) - entrances <= linked


# -- settings ---------------------------------------------------------------------------------------


@pytest.mark.check
def test_readme_has_every_setting() -> None:
    """No more and no fewer, in the table."""
    named = [code(row[0])[0].lower() for row in table(README, "| name | default | meaning |")]

    assert sorted(named) == sorted(Settings.model_fields)


@pytest.mark.check
def test_readme_has_every_default() -> None:
    """A default in code style is the program's own; one in words stands for none, or for what the machine says."""
    real = load({})
    known = {"<DATA_DIR>": str(real.data_dir), "<RESPONDER_LISTEN>": real.responder_listen}
    by_words = {None, (), real.node_name}
    for name, default, _ in table(README, "| name | default | meaning |"):
        setting = code(name)[0].lower()
        value = getattr(real, setting)
        if not code(default) or default == "none":
            assert value in by_words, setting
            continue
        written = code(default)[0]
        for word, meaning in known.items():
            written = written.replace(word, meaning)
        assert written == shown(value), setting


def shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, tuple) else str(value)


@pytest.mark.check
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_variables_are_settings(path: Path) -> None:
    """Whatever a document calls CERTWORKER_SOMETHING is one."""
    for name in re.findall(rf"\b{PREFIX}([A-Z_]+[A-Z])\b", path.read_text()):
        assert name.lower() in {*Settings.model_fields, "config"}


@pytest.mark.check
@pytest.mark.parametrize("text", snippets("settings"))
def test_settings_snippets_are_settings(text: str, tmp_path: Path) -> None:
    """They are read as the program reads them."""
    file = tmp_path / "certworker.toml"
    file.write_text(text)

    assert load({}, file)


# -- commands ---------------------------------------------------------------------------------------


def commands(group: click.Group, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Give every command that does something, with the words that call it."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, (*words, name))
        else:
            yield (*words, name), command


def real_commands() -> dict[tuple[str, ...], click.Command]:
    from certworker.cli.main import cli

    return dict(commands(cli))


@pytest.mark.check
def test_readme_has_every_command_with_its_options() -> None:
    """No more and no fewer, in the table."""
    real = real_commands()
    documented: dict[tuple[str, ...], set[str]] = {}
    for row in table(README, "| command | does |"):
        words = code(row[0])[0].split()
        assert words[0] == "certworker"
        path = tuple(word for word in words[1:] if re.fullmatch(r"[a-z]+", word))
        documented[path] = set(re.findall(r"--[a-z-]+", row[0]))

    assert documented.keys() == real.keys()
    for path, options in documented.items():
        assert options == {word for p in real[path].params for word in p.opts if word.startswith("--")}, path


@pytest.mark.check
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_named_in_the_text_exist(path: Path) -> None:
    """`certworker WORD` in code style, and every line of a fence that calls it."""
    groups = {words[:1] for words in real_commands()}
    text = path.read_text().partition("\n## Not yet\n")[0]
    for word in re.findall(r"(?:`certworker|^cw) ([a-z]+)\b", text, re.MULTILINE):
        assert (word,) in groups, word


@pytest.mark.check
def test_unit_runs_the_program() -> None:
    """The systemd unit calls a real command with real settings."""
    (text,) = (param.values[0] for param in snippets("unit"))
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[method-assign,assignment]
    parser.read_string(str(text))
    service = parser["Service"]
    program, *words = shlex.split(service["ExecStart"])

    assert Path(program).name == "certworker"
    assert tuple(words) in real_commands()
    assert service["Environment"].partition("=")[0] == f"{PREFIX}CONFIG"


@pytest.mark.check
def test_make_targets_exist() -> None:
    """`make WORD` in a document is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in DOCUMENTS:
        named = set(re.findall(r"(?:`|^)make ([a-z]+)", path.read_text(), re.MULTILINE))
        assert named <= targets, path


# -- the map ----------------------------------------------------------------------------------------


@pytest.mark.check
def test_map_has_every_module() -> None:
    """Rooms and files, no more and no fewer; what a room is for stands in its `__init__.py`."""
    package = ROOT / "certworker"
    real = {path.relative_to(package) for path in package.rglob("*.py") if path.name != "__init__.py"}
    mapped: set[Path] = set()
    folders: list[str] = []
    for line in block(ARCHITECTURE, "map")[1:]:
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2 - 1
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name.strip("/"))
        else:
            mapped.add(Path(*folders, name))

    assert mapped == real


@pytest.mark.check
def test_layers_are_those_that_are_checked() -> None:
    """The import rule in the document is the one in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (layers,) = (c["layers"] for c in project["tool"]["importlinter"]["contracts"] if c["type"] == "layers")

    assert block(ARCHITECTURE, "layers") == [layer.replace("certworker.", "") for layer in layers]


@pytest.mark.check
def test_states_are_told() -> None:
    """Every state stands in the picture of the state machine, and in the README's trace."""
    picture = set(re.findall(r"[a-z]+(?:_[a-z]+)*", " ".join(block(ARCHITECTURE, "states"))))
    traced = {code(row[0])[0] for row in table(README, next(x for x in README.splitlines() if "committed state" in x))}

    assert set(State) <= picture
    assert traced == set(State) - {State.FAILED, State.CANCELLED}
    assert {f"`{State.FAILED}`", f"`{State.CANCELLED}`"} <= set(re.findall(r"`[a-z]+`", README))


@pytest.mark.check
def test_tables_are_told() -> None:
    """docs/architecture.md says what every table is for."""
    from certworker.store.tables import metadata

    told = {name for line in ARCHITECTURE.splitlines() if line.startswith("| `") for name in code(line.split("|")[1])}

    assert set(metadata.tables) <= told


# -- errors -----------------------------------------------------------------------------------------

_UNITS = {"s": timedelta(seconds=1), "min": timedelta(minutes=1), "h": timedelta(hours=1)}


@pytest.mark.check
def test_classes_and_schedules_are_told() -> None:
    """The waits of a class are the program's, without the spread."""
    now = datetime(2026, 11, 22, tzinfo=UTC)
    rows = list(table(ERRORS, "| class | who acts | attempts after | what goes on |"))
    assert [code(row[0])[0] for row in rows] == list(ErrorClass)
    for row in rows:
        failure = Failure(ErrorClass(code(row[0])[0]), "", "", "")
        told = [int(n) * _UNITS[unit] for n, unit in re.findall(r"(\d+) (s|min|h)", row[2])]
        real = [retry_at(failure, failures, now, 0.5) - now for failures in range(1, len(told) + 2)]

        assert real == [*told, told[-1]]


@pytest.mark.check
def test_error_types_are_told() -> None:
    """Every type that the program knows has its class, no more and no fewer."""
    everywhere = {
        code(row[0])[0]: code(row[1])[0] for row in table(ERRORS, "| type | class | what the operator sees |")
    }
    head = "| type | where | class | what the operator sees |"
    here = {(Endpoint(row[1]), code(row[0])[0]): code(row[2])[0] for row in table(ERRORS, head)}

    assert everywhere == {word: known[0].value for word, known in retry._EVERYWHERE.items()}
    assert here == {place: known[0].value for place, known in retry._HERE.items()}
    for word, told in everywhere.items():
        problem = Problem(f"urn:ietf:params:acme:error:{word}", "", status=400)
        assert classify_problem(problem, Endpoint.NEW_ORDER).error_class == told


@pytest.mark.check
def test_scopes_are_told() -> None:
    """Every type that is not one attempt's alone stands beside its scope."""
    told = {
        code(row[0])[0]: set(code(row[1])) for row in table(ERRORS, "| scope | what belongs to it | what follows |")
    }
    assert list(told) == list(Scope)
    for scope in (Scope.ACCOUNT, Scope.CA):
        known = {word for word, meaning in retry._EVERYWHERE.items() if meaning.scope is scope}
        assert told[scope] - {"unauthorized"} == known


# -- snippets ---------------------------------------------------------------------------------------


@pytest.mark.check
def test_gateway_snippet_of_the_readme_applies(tmp_path: Path) -> None:
    """The real commands, in the README's order."""
    (text,) = (param.values[0] for param in snippets("gateway"))
    (tmp_path / "gateway.toml").write_text(str(text))
    for words in ("init", "config apply gateway.toml", "policy add www.example.com", "status", "config export"):
        run(tmp_path, "-m", "certworker", *words.split())


@pytest.mark.check
@pytest.mark.parametrize("text", snippets("python"))
def test_python_snippets_run(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand, after `certworker init`."""
    monkeypatch.chdir(tmp_path)
    wiring.initialise(load({}), schema.upgrade)

    assert run(tmp_path, "-W", "error", "-c", text) != "None\n"


@pytest.mark.parametrize("text", snippets("postgresql"))
def test_sql_snippets_run(text: str, postgresql: Any, postgresql_template: str) -> None:
    """On a migrated database; the triggers note what was written."""
    name = postgresql.create_database(postgresql_template)
    with psycopg.connect(postgresql.url(name)) as connection:
        connection.execute(text.encode())
        noted = connection.execute("SELECT topic FROM changes").fetchall()
    postgresql.drop_database(name)

    assert noted == [("policy",)]


@pytest.mark.check
def test_public_names_are_there() -> None:
    """docs/core-library.md lists what exists, and each class and function of it says what it is."""
    text = (ROOT / "docs" / "core-library.md").read_text()
    for row in table(text, "| module | names |"):
        module = import_module(code(row[0])[0])
        for name in code(row[1]):
            value = getattr(module, name)
            assert not callable(value) or value.__doc__, f"{module.__name__}.{name}"


def run(folder: Path, *arguments: str) -> str:
    """Run Python in `folder` without any setting of ours, and return what it printed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=kept, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
