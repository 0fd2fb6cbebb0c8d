"""docker-compose.pebble.yml stays in step with the program, on machines that have no container engine."""

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from certworker import settings
from certworker.store import tables

ROOT = Path(__file__).parents[1]
COMPOSE_FILE = ROOT / "docker-compose.pebble.yml"
DOCUMENT: dict[str, Any] = yaml.safe_load(COMPOSE_FILE.read_text())
PROGRAMS = [
    pytest.param(service, id=name)
    for name, service in DOCUMENT["services"].items()
    if service["image"] == "certworker:dev" and "entrypoint" not in service
]
"""The services that run certworker itself."""

pytestmark = pytest.mark.check


@pytest.fixture
def mounted(tmp_path: Path) -> dict[str, str]:
    """What the containers see under a path of theirs, as a path of ours."""
    trust = tmp_path / "pebble.minica.pem"
    trust.touch()
    seen = {f"/pebble-certs/{trust.name}": str(trust)}
    for name, config in DOCUMENT["configs"].items():
        (tmp_path / name).write_text(config["content"])
        seen[f"/{name}"] = str(tmp_path / name)
    return seen


def test_follows_the_compose_specification() -> None:
    """Its own schema, which check-jsonschema brings along."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE_FILE)]
    outcome = subprocess.run(command, capture_output=True, text=True)

    assert outcome.returncode == 0, outcome.stdout


def test_has_the_whole_cast() -> None:
    """And needs nothing from the shell that starts it."""
    assert {"postgres", "pebble", "challtestsrv", "haproxy", "certworker"} <= DOCUMENT["services"].keys()
    assert "$" not in COMPOSE_FILE.read_text()


@pytest.mark.parametrize("service", PROGRAMS)
def test_variables_are_settings(service: dict[str, Any], mounted: dict[str, str]) -> None:
    """Every CERTWORKER_ variable parses as the program will parse it."""
    environment = {name: mounted.get(value, value) for name, value in service["environment"].items()}

    assert environment
    assert all(name.startswith(settings.PREFIX) and isinstance(value, str) for name, value in environment.items())
    assert settings.load(environment)


@pytest.mark.parametrize("service", PROGRAMS)
def test_commands_are_commands(service: dict[str, Any], mounted: dict[str, str]) -> None:
    """Every command line parses with the real commands, its options and arguments included."""
    from certworker.cli.main import cli

    command: click.Command = cli
    words = [mounted.get(word, word) for word in service["command"]]
    # With its parent, as the real run has it: click keeps what the first context says of --help.
    context = cli.make_context("certworker", list(words), resilient_parsing=True)
    while isinstance(command, click.Group):
        found = command.get_command(context, words[0])
        assert found, f"{command.name} has no command {words[0]}"
        command = found
        words.pop(0)

    assert command.make_context(command.name, words, parent=context)


def test_gateway_is_made_of_our_columns() -> None:
    """The configuration names tables and columns that exist."""
    gateway = tomllib.loads(DOCUMENT["configs"]["gateway.toml"]["content"])

    for table, rows in gateway.items():
        for row in rows:
            assert row.keys() <= set(tables.metadata.tables[table].columns.keys())


def test_addresses_agree() -> None:
    """Everybody finds the DNS stand-in, the proxy, the responders and the upstream where they are."""
    address = {
        name: service["networks"]["gateway"]["ipv4_address"]
        for name, service in DOCUMENT["services"].items()
        if isinstance(service["networks"], dict)
    }
    shared = DOCUMENT["x-settings"]

    assert shared["CERTWORKER_DNS_RESOLVER"] == f"{address['challtestsrv']}:8053"
    assert f"{address['challtestsrv']}:8053" in DOCUMENT["services"]["pebble"]["command"]
    assert address["haproxy"] in DOCUMENT["services"]["challtestsrv"]["command"]
    assert set(shared["CERTWORKER_RESPONDER_ADDRESSES"].split(",")) == {
        f"{address[name]}:8402" for name in ("haproxy", "certworker")
    }
    assert f'"{address["upstream"]}:8000"' in DOCUMENT["configs"]["gateway.toml"]["content"]


def test_the_upstream_has_something_to_serve() -> None:
    """The folder it serves is where the file says that its page is mounted."""
    upstream = DOCUMENT["services"]["upstream"]
    folder = upstream["entrypoint"][upstream["entrypoint"].index("--directory") + 1]

    assert [config["target"] for config in upstream["configs"]] == [f"{folder}/index.html"]
    assert DOCUMENT["configs"][upstream["configs"][0]["source"]]["content"].strip()
