"""Proxies that answer challenges by themselves, and versions that a proxy refuses: real Pebble, real proxies."""

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from certworker.cli.pebble import Pebble, free_ports

from .box import Box, until

pytestmark = [pytest.mark.pebble, pytest.mark.proxy]


@pytest.mark.parametrize("proxy", ["haproxy", "nginx"])
def test_a_proxy_answers_by_itself(folder: Path, start_pebble: Callable[..., Pebble], proxy: str) -> None:
    """Nobody listens where responders are said to be; after a change of the account's key it goes on."""
    ca = start_pebble(authz_reuse=0)
    (nobody,) = free_ports(1)
    box = Box.make(folder, ca, node=proxy, RESPONDER_ADDRESSES=f"127.0.0.1:{nobody}")
    box.configure("first.flow.test", challenge="stateless")
    with box.service():
        until(lambda: box.served("first.flow.test"), limit=60)
        box.run("account", "rollover")
        box.run("policy", "add", "second.flow.test")
        until(lambda: box.served("second.flow.test"), limit=60)

    assert len(ca.ledger()) == 2
    assert [event for event in box.log() if event["event"] == "issuance.trouble"] == []


def test_renew_alone_waits_for_its_own_proxy(folder: Path, start_pebble: Callable[..., Pebble]) -> None:
    """One command: account, thumbprint, proxy, order."""
    ca = start_pebble(authz_reuse=0)
    (nobody,) = free_ports(1)
    box = Box.make(folder, ca, RESPONDER_ADDRESSES=f"127.0.0.1:{nobody}")
    box.configure("alone.flow.test", challenge="stateless")

    done = box.json("renew", "--timeout", "60")

    assert [one["name"] for one in done["renewed"]] == ["alone.flow.test"]


def test_a_version_that_the_proxy_refuses_is_rolled_back(folder: Path, start_pebble: Callable[..., Pebble]) -> None:
    """Somebody else has the port: the version before is published again, visitors notice nothing, a person is told."""
    ca = start_pebble()
    box = Box.make(folder, ca)
    box.configure("stays.flow.test")
    with box.upstream(), box.service(), socket.create_server(("127.0.0.1", 0)) as other:
        until(lambda: box.served("stays.flow.test"), limit=60)
        before = box.json("status")["published"]["number"]
        box.configure("stays.flow.test", ports=[other.getsockname()[1]])
        until(lambda: any(event["event"] == "version.taken_back" for event in box.log()), limit=60)
        until(lambda: box.status()["nodes"][0]["version"] == before + 2, limit=60)
        shown = box.json("status")
        versions = {one["number"]: one for one in box.json("config", "versions")}
        answer = box.get("stays.flow.test", ca.root_pem())

    assert answer[:2] == (200, b"hello from upstream")
    assert shown["nodes"][0]["error"] is None
    assert versions[before + 2]["restores"] == before
    assert "another process listens on it" in str(shown["publish_hold"])
