"""Accounts beside a running service: lost by the CA, given up, their key changed, and all of it cut off half-way."""

import json
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest

from certworker.ca.client import Client
from certworker.ca.keys import AccountKey
from certworker.ca.transport import Transport
from certworker.cli.account import describe
from certworker.cli.output import to_json
from certworker.cli.pebble import Pebble, free_ports
from certworker.settings import load
from certworker.store.accounts import list_all
from certworker.store.seal import Sealer, read_kek
from certworker.wiring import open_app
from tests.chaos.proxy import FaultProxy, Hold
from tests.conftest import PostgresServer

from .box import Box, until

pytestmark = [pytest.mark.pebble]


@dataclass
class Scene:
    """A box whose responder the CA reaches itself, and the fault proxy between the two."""

    box: Box
    ca: Pebble
    proxy: FaultProxy

    def issue(self, *names: str) -> None:
        """Want names, and wait until they have certificates."""
        self.box.run("policy", "add", *names)
        until(lambda: all(self.lineage(name).get("status") == "active" for name in names), 60)

    def lineage(self, dns_name: str) -> dict[str, Any]:
        """Return what status says of a name; nothing while the service has not seen that it is wanted."""
        found = [one for one in self.box.status()["lineages"] if dns_name in one["names"]]
        return dict(found[0]) if found else {}

    def query(self, statement: str) -> list[tuple[Any, ...]]:
        url = self.box.environ.get("CERTWORKER_DATABASE_URL")
        if url is not None:
            with psycopg.connect(url) as connection:
                return connection.execute(statement.encode()).fetchall()
        with closing(sqlite3.connect(self.box.folder / "data" / "certworker.db")) as database:
            return database.execute(statement).fetchall()

    def account(self) -> dict[str, Any]:
        """Return the account that is used as `account list` says it, without starting that each time."""
        app = open_app(load(self.box.environ))
        listed = [describe(one, app.clock()) for one in app.db.read(list_all)]
        app.close()
        (used,) = [one for one in listed if one["default"]]
        return dict(json.loads(to_json(used)))

    def row(self) -> dict[str, Any]:
        """Return what is stored of the account that is used."""
        ((found,),) = self.query(f"SELECT credentials_json FROM acme_accounts WHERE id = '{self.account()['id']}'")
        return dict(found if isinstance(found, dict) else json.loads(found))

    def key(self, name: str = "key") -> AccountKey:
        """Return one of its keys."""
        place = {"table": "acme_accounts", "column": "credentials_json", "row_id": self.account()["id"]}
        kek = read_kek(self.box.folder / "data" / "kek")
        return AccountKey.from_pem(Sealer(kek).open(self.row()[name], **place))

    @contextmanager
    def client(self) -> Iterator[Client]:
        transport = Transport(self.proxy.ca_bundle)
        yield Client(self.proxy.directory_url, transport, lambda: datetime.now(UTC))
        transport.close()

    def audited(self) -> list[str]:
        return [action for (action,) in self.query(
            "SELECT action FROM audit_logs WHERE action LIKE 'account.%' ORDER BY created_at, id")]  # fmt: skip

    def failed(self) -> list[tuple[Any, ...]]:
        return self.query("SELECT state, error FROM issuances WHERE state IN ('failed', 'cancelled')")


@pytest.fixture
def make(folder: Path, start_pebble: Callable[..., Pebble]) -> Iterator[Callable[..., Scene]]:
    """Make a scene; its settings may name another database."""
    with ExitStack() as stack:

        def make(**settings: str) -> Scene:
            ca = start_pebble(nonce_reject=0)  # a request that is held is one that the CA would have taken
            proxy = stack.enter_context(FaultProxy(ca, folder / "proxy"))
            ours = {"ACME_DIRECTORY_URL": proxy.directory_url, "ACME_CA_BUNDLE": str(proxy.ca_bundle),
                    "RESPONDER_LISTEN": f"127.0.0.1:{ca.http_port}", "ACME_CONTACT": "ops@example.com"}  # fmt: skip
            box = Box.make(folder, ca, node="none", **{**ours, **settings})
            box.run("init")
            return Scene(box, ca, proxy)

        yield make


def assert_one_key(scene: Scene) -> None:
    """The row has the key that the CA has, and nothing is open."""
    with scene.client() as client:
        found = client.find_account(scene.key())
    assert found is not None
    assert found.url == scene.account()["account_url"]
    assert scene.account()["status"] == "valid"
    assert len(scene.box.json("account", "list")) == 1


@pytest.mark.parametrize(("route", "issued_before"), [("finalize", 0), ("certificate", 1)])
def test_a_ca_that_is_reset_in_the_middle_of_an_order(
    make: Callable[..., Scene], route: str, issued_before: int
) -> None:
    """A39: the account is made again with its key, and its new life has exactly one certificate."""
    scene = make()
    hold = Hold()
    with scene.box.service():
        scene.box.run("account", "register")
        before, key = scene.account(), scene.row()["key"]
        scene.proxy.on(route, hold)
        scene.box.run("policy", "add", "reset.flow.test")
        until(lambda: hold.reached)
        scene.ca.restart()
        hold.release()
        until(lambda: scene.lineage("reset.flow.test").get("status") == "active", 60)

    assert len(scene.ca.ledger()) == issued_before + 1
    after = scene.account()
    assert after["account_url"] != before["account_url"]
    assert (after["id"], scene.row()["key"]) == (before["id"], key)
    assert scene.audited() == ["account.registered", "account.forgotten"]
    assert_one_key(scene)
    alerts = [line for line in scene.box.log() if line["event"] == "account.forgotten"]
    assert [line["level"] for line in alerts] == ["error"]
    assert "accounturi" in alerts[0]["hint"]


def test_an_account_that_was_deactivated_elsewhere(make: Callable[..., Scene]) -> None:
    """A40: nothing is made by itself; what is served stays, the cure is told, and works."""
    scene = make()
    with scene.box.service():
        scene.issue("before.flow.test")
        with scene.client() as client:
            account = client.find_account(scene.key())
            assert account is not None
            client.deactivate_account(account)
        scene.box.run("policy", "add", "after.flow.test")
        error = until(lambda: scene.lineage("after.flow.test").get("error"))
        assert error["class"] == "action_required"
        assert "`certworker account register --new-key`" in error["hint"]
        assert len(scene.box.json("account", "list")) == 1
        assert scene.lineage("before.flow.test")["status"] == "active"
        refused = scene.box.run("account", "register", expect=1)
        assert "--new-key" in refused.stderr
        assert len(scene.proxy.seen("newAccount", 201)) == 1
        assert len(scene.proxy.seen("newOrder", 403)) == 1

        scene.box.run("account", "register", "--new-key")
        scene.box.run("renew", "after.flow.test")

    assert len(scene.ca.ledger()) == 2
    assert [one["default"] for one in scene.box.json("account", "list")] == [True, False]


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_keys_change_while_a_service_issues(
    make: Callable[..., Scene], database: str, request: pytest.FixtureRequest
) -> None:
    """Thirty names, three new keys while some are validated, on PostgreSQL two workers: none fails or is repeated."""
    settings = {}
    if database == "postgresql":
        server: PostgresServer = request.getfixturevalue("postgresql")
        settings["DATABASE_URL"] = server.url(server.create_database())
    scene = make(**settings)
    with ExitStack() as services:
        services.enter_context(scene.box.service())
        if database == "postgresql":
            services.enter_context(second_worker(scene))
        scene.box.run("account", "register")
        keys = {scene.key()}
        for wave in range(3):
            hold = Hold()
            scene.proxy.on("challenge", hold)
            scene.box.run("policy", "add", *(f"n{wave}{number}.flow.test" for number in range(10)))
            until(lambda hold=hold: hold.reached)  # type: ignore[misc]
            with start(scene, "account", "rollover") as rollover:
                until(lambda: scene.account()["status"] == "changing key")
                assert len(scene.proxy.seen("keyChange", 200)) == wave
                hold.release()
            assert rollover.returncode == 0
            keys.add(scene.key())
        until(lambda: scene.query("SELECT count(*) FROM lineages WHERE status = 'active'") == [(30,)], 60)

    assert len(keys) == 4
    assert scene.failed() == []
    assert scene.query("SELECT count(*) FROM issuances") == [(30,)]
    assert len(scene.ca.ledger()) == 30
    assert_one_key(scene)


def start(scene: Scene, *words: str) -> subprocess.Popen[bytes]:
    """Start a command and return at once."""
    return subprocess.Popen(
        [sys.executable, "-m", "certworker", *words], env=scene.box.environ, cwd=scene.box.folder,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def second_worker(scene: Scene) -> Any:
    """Return another worker's service, with a folder of its own and the same key file."""
    api, responder = free_ports(2)
    kek = scene.box.folder / "data" / "kek"
    return scene.box.service(
        name="second", DATA_DIR=str(scene.box.folder / "second"), KEK_FILE=str(kek), API_LISTEN=f"127.0.0.1:{api}",
        RESPONDER_LISTEN=f"127.0.0.1:{responder}",
    )  # fmt: skip


@pytest.mark.parametrize("answered", [False, True], ids=["before-the-ca", "after-the-ca"])
def test_a_rollover_that_is_killed(make: Callable[..., Scene], answered: bool) -> None:
    """kill -9 while keyChange is under way: the service goes on with the key that the CA has; the command ends it."""
    scene = make()
    hold = Hold(answered=answered)
    with scene.box.service():
        scene.issue("before.flow.test")
        old = scene.key()
        scene.proxy.on("keyChange", hold)
        killed = start(scene, "account", "rollover")
        until(lambda: hold.reached)
        killed.kill()
        assert killed.wait() == -signal.SIGKILL
        new = scene.key("pending_key")
        assert scene.account()["status"] == "changing key"
        if not answered:
            scene.box.run("account", "rollover")
        scene.issue("after.flow.test")

    assert scene.key() == new != old
    assert "pending_key" not in scene.row()
    assert scene.failed() == []
    assert len(scene.ca.ledger()) == 2
    assert scene.audited() == ["account.key_changed"]
    assert_one_key(scene)


def test_commands_show_no_key(make: Callable[..., Scene]) -> None:
    """Nor does the log of a service whose account was changed behind its back."""
    scene = make()
    with scene.box.service(LOG_LEVEL="debug"):
        scene.issue("a.flow.test")
        for words in (["rollover"], ["rollover", "--json"], ["list"], ["list", "--json"], ["register", "--json"]):
            scene.box.run("account", *words)
        scene.issue("b.flow.test")
        stored = scene.row()["key"]

    said = "\n".join(scene.box.outputs)
    assert "account" in said
    assert "PRIVATE KEY" not in said
    assert stored not in said
    assert scene.failed() == []
