"""Which certificates and keys may reach a proxy."""

from dataclasses import replace

import pytest

from certworker.errors import PairRefused
from certworker.node.pairs import render_pair

from .conftest import Authority


def test_a_pair_is_written_anew(authority: Authority) -> None:
    """Only certificates and the key come out, without a blank line, whatever stood around them."""
    pair = authority.issue(1, "a.test", "*.b.test")
    dressed = replace(
        pair,
        chain_pem=f"junk\n\nshutdown frontend L_1\n{pair.chain_pem}\n\n; quit\n",
        key_pem=f"\n\nset ssl cert x\n\n{pair.key_pem}",
    )

    assert render_pair(dressed) == render_pair(pair)
    assert render_pair(pair).decode() == pair.chain_pem + pair.key_pem
    assert b"\n\n" not in render_pair(dressed)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"chain_pem": ""}, "cannot be read"),
        ({"chain_pem": "é"}, "cannot be read"),
        ({"chain_pem": "\n" * 300_000}, "more than 262144"),
        ({"key_pem": ""}, "cannot be read"),
        ({"key_pem": "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"}, "cannot be read"),
        ({"fingerprint": "0" * 64}, "fingerprint"),
        ({"dns_names": ()}, "no names"),
        ({"dns_names": ("b.test",)}, "does not cover b.test"),
        ({"dns_names": ("y.x.wild.test",)}, "does not cover"),
        ({"dns_names": ("*.a.test",)}, "does not cover"),
        ({"dns_names": ("A.test",)}, "A-labels"),
        ({"dns_names": ("a.test\nx",)}, "A-labels"),
        ({"dns_names": ("a.test [verify none]",)}, "A-labels"),
        ({"dns_names": ("*",)}, "A-labels"),
        ({"dns_names": ("#a.test",)}, "A-labels"),
    ],
)
def test_a_pair_that_does_not_fit_is_refused(authority: Authority, change: dict[str, str], why: str) -> None:
    """The message names certificate and rule, and never a piece of the key."""
    pair = replace(authority.issue(1, "a.test", "*.wild.test"), **change)  # type: ignore[arg-type]
    with pytest.raises(PairRefused, match=why) as refused:
        render_pair(pair)

    assert pair.id in str(refused.value)
    assert "PRIVATE" not in str(refused.value)
    assert str(refused.value).isprintable()


def test_names_under_a_wildcard_are_covered(authority: Authority) -> None:
    """One label, as clients see it."""
    pair = authority.issue(1, "*.wild.test")

    assert render_pair(replace(pair, dns_names=("x.wild.test", "*.wild.test")))


def test_a_foreign_key_is_refused(authority: Authority) -> None:
    """Key and leaf belong together."""
    pair = replace(authority.issue(1, "a.test"), key_pem=authority.issue(2, "a.test").key_pem)
    with pytest.raises(PairRefused, match="not the leaf's"):
        render_pair(pair)
