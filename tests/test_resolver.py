"""What DNS says of a name, asked at a resolver of our own: Pebble's DNS stand-in."""

from collections.abc import Callable

import pytest

from certworker.cli.pebble import Pebble
from certworker.resolver import look_up


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


@pytest.mark.parametrize("name", ["", "a..b", "x" * 300])
def test_a_strange_name_is_an_answer_not_a_crash(name: str, free_port: Callable[[], int]) -> None:
    """It is only ever a hint."""
    assert look_up("a.test", "no-such-host.invalid:53").trouble
    assert look_up(name, f"127.0.0.1:{free_port()}").trouble
