"""What an operator sees when the CA or the way to it is not as it should be."""

from collections.abc import Callable
from pathlib import Path

import pytest

from certworker.cli.pebble import Pebble, free_ports, make_listener_certificate

from .box import Box

pytestmark = [pytest.mark.pebble]


def assert_told(box: Box, dns_name: str, error_class: str, word: str) -> dict[str, str]:
    """The failure is in `status`, with class, what was said, the next attempt and a hint."""
    error = box.lineage(dns_name)["error"]
    assert error["class"] == error_class, error
    assert word in error["detail"] + error["type"], error
    assert error["retry_at"]
    assert error["hint"]
    text = box.run("status", dns_name).stdout
    assert error["hint"].split(";")[0][:40] in " ".join(text.split())
    return dict(error)


def test_an_unreachable_directory(folder: Path, start_pebble: Callable[..., Pebble]) -> None:
    """Nobody listens there: exit code 1, waiting, nothing lost."""
    ca = start_pebble()
    (port,) = free_ports(1)
    box = Box.make(folder, ca, node="none", ACME_DIRECTORY_URL=f"https://127.0.0.1:{port}/dir")
    box.configure("far.flow.test")

    done = box.json("renew", "--timeout", "3", expect=1)

    assert [one["error"]["class"] for one in done["waiting"]] == ["transient"]
    assert_told(box, "far.flow.test", "transient", "refused")


def test_an_untrusted_directory(folder: Path, start_pebble: Callable[..., Pebble]) -> None:
    """The bundle does not hold the CA that signed it: never spoken to, and the setting is named."""
    ca = start_pebble()
    stranger, _ = make_listener_certificate(folder)
    box = Box.make(folder, ca, node="none", ACME_CA_BUNDLE=str(stranger))
    box.configure("untrusted.flow.test")

    before = ca.requests()

    box.json("renew", "--timeout", "3", expect=1)

    error = assert_told(box, "untrusted.flow.test", "transient", "certworker:ca-tls")
    assert "ACME_CA_BUNDLE" in error["detail"] + error["hint"]
    assert ca.requests() == before


def test_terms_not_agreed(folder: Path, start_pebble: Callable[..., Pebble]) -> None:
    """No account is made; the error says which setting and where the terms are."""
    ca = start_pebble()
    box = Box.make(folder, ca, node="none", ACME_TOS_AGREED="false")
    box.configure("terms.flow.test")

    done = box.json("renew", expect=1)

    assert [one["error"]["class"] for one in done["failed"]] == ["action_required"]
    error = assert_told(box, "terms.flow.test", "action_required", "terms")
    assert "ACME_TOS_AGREED" in error["hint"]


def test_a_wrong_external_account_key(folder: Path, start_pebble: Callable[..., Pebble]) -> None:
    """The CA refuses the binding: told as such, the secret is nowhere."""
    secret = "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W"
    wrong = "A" * 43
    ca = start_pebble(eab={"kid-1": secret})
    box = Box.make(folder, ca, node="none", ACME_EAB_KID="kid-1", ACME_EAB_HMAC_KEY=wrong)
    box.configure("eab.flow.test")

    box.json("renew", expect=1)

    assert_told(box, "eab.flow.test", "action_required", "")
    assert not any(wrong in output for output in box.outputs)
    right = Box.make(folder, ca, ACME_EAB_KID="kid-1", ACME_EAB_HMAC_KEY=secret)
    right.environ["CERTWORKER_DATA_DIR"] = box.environ["CERTWORKER_DATA_DIR"]
    right.configure("eab.flow.test")
    done = right.json("renew", "eab.flow.test")
    assert len(done["renewed"]) == 1


def test_a_refused_name(folder: Path, start_pebble: Callable[..., Pebble]) -> None:
    """The CA will not issue for it: permanent, one order, its neighbours go on."""
    ca = start_pebble(blocklist=("blocked.flow.test",))
    box = Box.make(folder, ca)
    box.configure("blocked.flow.test", "fine.flow.test")

    done = box.json("renew", expect=1)

    assert [one["name"] for one in done["failed"]] == ["blocked.flow.test"]
    assert [one["name"] for one in done["renewed"]] == ["fine.flow.test"]
    assert_told(box, "blocked.flow.test", "permanent", "rejectedIdentifier")
    assert [policy["status"] for policy in box.json("status")["policies"]] == ["error"]


def test_port_80_not_routed(folder: Path, start_pebble: Callable[..., Pebble]) -> None:
    """The CA cannot connect: the hint says what A and AAAA the name has, asked at DNS_RESOLVER."""
    ca = start_pebble()
    ca.challtest("add-a", {"host": "closed.flow.test.", "addresses": ["127.0.0.1"]})
    box = Box.make(folder, ca, node="none")
    box.configure("closed.flow.test")

    done = box.json("renew", expect=1)

    assert [one["error"]["class"] for one in done["failed"]] == ["validation"]
    error = assert_told(box, "closed.flow.test", "validation", "connection")
    assert "A 127.0.0.1" in error["hint"]
    assert "no AAAA" in error["hint"]


def test_a_profile_that_is_not_offered(folder: Path, start_pebble: Callable[..., Pebble]) -> None:
    """Told before any order, with what is offered."""
    ca = start_pebble()
    box = Box.make(folder, ca, node="none", ACME_PROFILE="gold")
    box.configure("profile.flow.test")

    box.json("renew", expect=1)

    error = assert_told(box, "profile.flow.test", "permanent", "gold")
    assert "default" in error["detail"]
