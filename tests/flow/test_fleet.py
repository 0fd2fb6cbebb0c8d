"""A fleet, whole: a control plane, Pebble, agents with real HAProxies on machines of their own."""

import json
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from certworker.cli.pebble import Pebble, free_ports
from certworker.core.transit import read_enrolment_token

from .box import Box, until
from .fleet import Fleet

pytestmark = [pytest.mark.pebble, pytest.mark.proxy]


@pytest.fixture
def fleet(folder: Path, start_pebble: Callable[..., Pebble]) -> Fleet:
    """A control plane that manages this machine's HAProxy too, so that the CA reaches one."""
    (port,) = free_ports(1)
    box = Box.make(folder, start_pebble(), NODE_LISTEN=f"127.0.0.1:{port}", NODE_SILENT_SECS="6")
    box.configure("shop.fleet.test")
    return Fleet(box, port)


def test_a_fleet_serves_and_swaps(fleet: Fleet) -> None:
    """Enrolled with a token, HAProxy and nginx serve what is issued; a renewal is served when all have proved it."""
    box = fleet.box
    box.environ["CERTWORKER_NODE_SILENT_SECS"] = "60"  # the second node stays live while it is frozen
    with (
        fleet.machine("gw1") as one, fleet.machine("gw2") as two, fleet.control_plane(),
        one.agent("--enroll", fleet.token("gw1")),
        two.agent("--enroll", fleet.token("gw2"), "--proxy", "nginx") as second,
    ):  # fmt: skip
        fleet.await_version(1, "gw1", "gw2", "box")
        fleet.await_served("shop.fleet.test")
        first = box.lineage("shop.fleet.test")["fingerprint_sha256"]
        shown = {one.shown("shop.fleet.test"), two.shown("shop.fleet.test")}
        second.send_signal(signal.SIGSTOP)
        waiting = box.json("renew", "shop.fleet.test", "--force", "--timeout", "3")["renewed"][0]
        status = box.run("status", "shop.fleet.test").stdout
        second.send_signal(signal.SIGCONT)
        fleet.await_served("shop.fleet.test")
        renewed = box.json("renew", "shop.fleet.test", "--force")["renewed"][0]
        shown_then = {one.shown("shop.fleet.test"), two.shown("shop.fleet.test")}

    assert shown == {first}
    assert waiting["served"] is False
    assert "issued, not yet served by: gw2: has not proved it yet" in " ".join(status.split())
    assert renewed["served"] is True
    assert shown_then == {renewed["fingerprint_sha256"]} != shown


def test_canary_first_and_a_refused_version_stops_there(fleet: Fleet) -> None:
    """The canary cannot serve it and says why: the version before comes back, and the other one never gets it."""
    box = fleet.box
    (port,) = free_ports(1)
    document = json.loads((box.folder / "gateway.json").read_text())
    changed = {**document, "listeners": [*document["listeners"], {"name": "more", "port": port, "protocol": "http"}]}
    with (
        fleet.machine("canary") as canary, fleet.machine("gw2") as other, fleet.control_plane(EMBEDDED_NODE="none"),
        other.agent("--enroll", fleet.token("gw2")),
    ):  # fmt: skip
        with canary.agent("--enroll", fleet.token("canary", "--canary")):
            fleet.await_version(1, "canary", "gw2")
            with canary.port_taken(port):
                apply(box, changed)
                fleet.await_version(3, "canary", "gw2")
            hold = box.json("status")["publish_hold"]
            apply(box, document)
            until(lambda: box.status()["publish_hold"] is None)
        apply(box, changed)
        fleet.await_published(4)
        listed = box.json("node", "list")
        shown, status = box.run("node", "list").stdout, box.run("status").stdout
        assert fleet.serve(3, "gw2")

    refused = f"canary refused it: version 2 is not applied: port {port}: another process listens on it"
    assert refused in hold["why"]
    assert "canary" in listed["held_back"]
    assert "version 4 goes to canaries only" in shown
    assert "version 4 goes to canaries only" in status
    assert [line["version"] for line in other.log() if line["event"] == "agent.serves"] == [1, 3]


@pytest.mark.parametrize("challenge", ["forward", "stateless"])
def test_three_nodes_behind_one_name(folder: Path, start_pebble: Callable[..., Pebble], challenge: str) -> None:
    """The CA may look at any of them, so all of them answer first; one that died is not waited for."""
    ca = start_pebble(authz_reuse=0)
    (port,) = free_ports(1)
    box = Box.make(folder, ca, node="none", NODE_LISTEN=f"127.0.0.1:{port}", NODE_SILENT_SECS="6")
    box.configure(challenge=challenge)
    fleet, names = Fleet(box, port), ("gw1", "gw2", "gw3")
    addresses = [f"127.0.0.{10 + number}" for number in (1, 2, 3)]
    ca.challtest("add-a", {"host": "all.fleet.test", "addresses": addresses})
    ca.challtest("add-a", {"host": "two.fleet.test", "addresses": addresses[:2]})
    with ExitStack() as stack:
        machines = [stack.enter_context(fleet.machine(*pair)) for pair in zip(names, addresses, strict=True)]
        stack.enter_context(fleet.control_plane())
        for machine in machines[:2]:
            stack.enter_context(machine.agent("--enroll", fleet.token(machine.name)))
        with machines[2].agent("--enroll", fleet.token("gw3"), "--proxy", "nginx"):
            until(lambda: len(fleet.nodes()) == 3)
            box.run("policy", "add", "all.fleet.test")
            fleet.await_served("all.fleet.test")
            shown = {machine.shown("all.fleet.test") for machine in machines}
        box.run("policy", "add", "two.fleet.test")
        fleet.await_served("two.fleet.test")

    assert len(shown) == 1
    assert shown != {None}
    assert len(ca.ledger()) == 2


def test_a_node_serves_on_and_comes_back(fleet: Fleet) -> None:
    """Control plane killed: the proxy serves. Agent away while two versions come: it gets the newest alone."""
    box = fleet.box
    document = json.loads((box.folder / "gateway.json").read_text())
    with fleet.machine("gw1") as machine:
        with fleet.control_plane("first") as service:
            with machine.agent("--enroll", fleet.token("gw1"), "--keep-proxy"):
                fleet.await_version(1, "gw1")
                leaf = until(lambda: machine.shown("shop.fleet.test"))
                service.kill()
                service.wait()
                until(lambda: any(line["event"] == "agent.trouble" for line in machine.log()))
                assert machine.shown("shop.fleet.test") == leaf
            assert machine.shown("shop.fleet.test") == leaf
        with fleet.control_plane("second"):
            for number, protocol in ((2, "http"), (3, "https")):
                listeners = [*document["listeners"], {"port": free_ports(1)[0], "protocol": protocol}]
                apply(box, {**document, "listeners": listeners})
                fleet.await_published(number)
            with machine.agent():
                fleet.await_version(3, "gw1")
                assert machine.shown("shop.fleet.test") == leaf
            box.run("node", "remove", "gw1")
            assert list(fleet.nodes()) == ["box"]

    assert leaf is not None
    assert {line["version"] for line in machine.log() if line["event"] == "agent.serves"} == {1, 3}


def test_who_does_not_belong_stays_outside(fleet: Fleet) -> None:
    """A token used twice, another control plane's key, a node that was removed: one line each, and no secret."""
    box = fleet.box
    with fleet.machine("gw1") as machine, fleet.control_plane(EMBEDDED_NODE="none"):
        word = fleet.token("gw1")
        token = read_enrolment_token(word)
        with machine.agent("--enroll", word):
            fleet.await_version(1, "gw1")
        machine.name = "gw2"
        with machine.agent("--enroll", word, expect=1) as twice:
            twice.wait()
        other = token.model_copy(update={"pin": "0" * 64})
        machine.name = "gw3"
        with machine.agent("--enroll", other.text(), expect=1) as wrong:
            wrong.wait()
        machine.name = "gw1"
        box.run("node", "remove", "gw1")
        with machine.agent():
            until(lambda: any("was removed" in line.get("error", "") for line in machine.log()))
        secret = json.loads((machine.folder / "node.json").read_text())["secret"]

    said = "\n".join(box.outputs)
    assert "the enrolment token of node gw1 has been used" in said
    assert "nothing was sent" in said
    assert secret not in said
    logs = "".join(path.read_text() for path in box.folder.glob("*.log"))
    for hidden in (secret, token.secret, "PRIVATE KEY"):
        assert hidden not in logs
    database = (box.folder / "data" / "certworker.db").read_bytes()
    assert secret.encode() not in database
    assert token.secret.encode() not in database


def apply(box: Box, document: dict[str, Any]) -> None:
    (box.folder / "changed.json").write_text(json.dumps(document))
    box.run("config", "apply", "changed.json")
