"""What DNS says of a name, asked at a resolver of our own: Pebble's DNS stand-in."""

import socket
import time
from collections.abc import Callable

import pytest

from certworker.cli.pebble import Pebble
from certworker.resolver import look_up, look_up_caa


@pytest.mark.pebble
def test_addresses_are_told_for_people(start_pebble: Callable[..., Pebble], free_port: Callable[[], int]) -> None:
    """A and AAAA, absence, and a server that does not answer."""
    ca = start_pebble()
    ca.challtest("add-a", {"host": "both.test.", "addresses": ["127.0.0.2"]})
    ca.challtest("add-aaaa", {"host": "both.test.", "addresses": ["::1"]})
    ca.challtest("set-servfail", {"host": "broken.test."})

    both = look_up("both.test", ca.dns_address)
    assert (both.a, both.aaaa) == (("127.0.0.2",), ("::1",))
    assert str(both) == "A 127.0.0.2, AAAA ::1 (a CA tries it first)"
    assert str(look_up("only.test", ca.dns_address)) == "A 127.0.0.1, no AAAA record"
    assert "error" in str(look_up("broken.test", ca.dns_address))
    by_name = "localhost:" + ca.dns_address.rpartition(":")[2]
    assert look_up("both.test", by_name).a == ("127.0.0.2",)


@pytest.mark.pebble
def test_who_may_issue_is_told_for_people(start_pebble: Callable[..., Pebble]) -> None:
    """Its own CAA records, else those of the nearest name above that has some (RFC 8659 §3)."""
    ca = start_pebble()
    pinned = "ca.test; accounturi=https://ca.test/account/1"
    ca.challtest("add-caa", {"host": "example.test.", "policies": [{"tag": "issue", "value": pinned}]})
    ca.challtest("add-caa", {"host": "own.example.test.", "policies": [{"tag": "issue", "value": ";"}]})
    ca.challtest("set-servfail", {"host": "broken.test."})

    assert look_up_caa("deep.a.example.test", ca.dns_address) == f'CAA records of example.test: 0 issue "{pinned}"'
    assert look_up_caa("own.example.test", ca.dns_address) == 'CAA records of own.example.test: 0 issue ";"'
    assert look_up_caa("else.test", ca.dns_address) == "no CAA record"
    assert "error" in look_up_caa("www.broken.test", ca.dns_address)


def test_a_resolver_that_is_silent_is_not_waited_for_long() -> None:
    """One time limit for a name of many labels."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        asked_at = time.monotonic()
        told = look_up_caa("a." * 100 + "test", f"127.0.0.1:{silent.getsockname()[1]}", 0.2)

    assert told == "DNS did not answer in time"
    assert time.monotonic() - asked_at < 3


@pytest.mark.parametrize("name", ["", "a..b", "x" * 300])
def test_a_strange_name_is_an_answer_not_a_crash(name: str, free_port: Callable[[], int]) -> None:
    """It is only ever a hint."""
    assert look_up("a.test", "no-such-host.invalid:53").trouble
    assert look_up(name, f"127.0.0.1:{free_port()}").trouble
    assert look_up_caa(name, f"127.0.0.1:{free_port()}")
