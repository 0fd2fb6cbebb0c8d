"""The test CA that the demo and the other tests lean on."""

import socket
from collections.abc import Callable
from pathlib import Path

import dns.message
import dns.query
import pytest

from certworker.cli import pebble as room
from certworker.cli.pebble import Pebble
from certworker.errors import UsageError

pytestmark = pytest.mark.pebble


def test_directory_offers_what_we_use(pebble: Pebble) -> None:
    """Renewal information and profiles: an older Pebble has neither."""
    directory = pebble.directory()

    assert "renewalInfo" in directory
    assert directory["meta"]["profiles"] == {"default": "90 days"}
    assert not pebble.deadlocked()
    assert pebble.requests()["GET", "/dir"] >= 1
    assert pebble.ledger() == []


def test_every_name_leads_to_loopback(pebble: Pebble) -> None:
    """The stand-in answers A with 127.0.0.1 and AAAA with nothing, until it is told otherwise."""
    host, port = pebble.dns_address.split(":")

    def ask(kind: str) -> list[str]:
        answer = dns.query.udp(dns.message.make_query("app.test", kind), host, port=int(port), timeout=5)
        return [record.to_text() for entry in answer.answer for record in entry]

    assert ask("A") == ["127.0.0.1"]
    assert ask("AAAA") == []
    pebble.challtest("add-a", {"host": "app.test.", "addresses": ["127.0.0.9"]})
    assert ask("A") == ["127.0.0.9"]


def test_restart_is_another_ca_at_the_same_address(pebble: Pebble) -> None:
    """Same URL, same listener certificate, new root."""
    before = pebble.root_pem()

    pebble.restart()

    assert pebble.directory()
    assert pebble.root_pem() != before
    assert pebble.intermediate_pem() != pebble.root_pem()


def test_stops_and_leaves_nothing(start_pebble: Callable[..., Pebble]) -> None:
    """Without a folder of its own the temporary one is gone, and so are both listeners."""
    with Pebble(alternate_roots=1, profiles={"a": {"description": "a"}, "b": {"description": "b"}}) as ca:
        folder = ca.log_path.parent
        assert ca.root_pem(1)

    assert not folder.exists()
    host, port = ca.directory_url.removeprefix("https://").removesuffix("/dir").split(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)))


def test_missing_binary_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The error says what to run."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("PEBBLE", raising=False)
    monkeypatch.setattr(room, "CHECKOUT_TOOLS", tmp_path)

    with pytest.raises(UsageError, match="make setup"):
        room.find_binary("pebble")
