"""Proof by handshake: what a client of the local proxy is really shown.

Every handshake has a fresh context: a resumed session would show the certificate of the first one.
"""

import hashlib
import random
import socket
import ssl
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from certworker.node.patience import Patience

ROUNDS = 3
"""One good answer may come from a worker that is about to leave."""
SAMPLE = 20
"""How many of many are asked again in the rounds after the first."""
HANDSHAKE_LIMIT = timedelta(seconds=3)
SETTLE_LIMIT = timedelta(seconds=5)
"""How long a wrong answer may still become a right one."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What one handshake showed: a leaf, or why there was none."""

    fingerprint: str | None = None
    """SHA-256 of the leaf's DER."""
    fault: str | None = None
    """The alert in OpenSSL's words, for example `TLSV1_UNRECOGNIZED_NAME`, or the socket's error."""


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a listener has to show for a name."""

    certificate_id: str
    port: int
    dns_name: str
    fingerprint: str


Probe = Callable[[int, str], Seen]


def probe_tls(port: int, dns_name: str, limit: timedelta = HANDSHAKE_LIMIT) -> Seen:
    """Shake hands with the local listener on `port`, asking for `dns_name`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # we ask which certificate is shown, not whether to trust it
    try:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=limit.total_seconds()) as plain,
            context.wrap_socket(plain, server_hostname=dns_name.replace("*", "certworker-probe")) as secure,
        ):
            leaf = secure.getpeercert(binary_form=True)
    except ssl.SSLError as refused:
        return Seen(fault=refused.reason or str(refused))
    except OSError as failed:
        return Seen(fault=str(failed))
    return Seen(fingerprint=hashlib.sha256(leaf).hexdigest()) if leaf else Seen(fault="no certificate was shown")


def prove(
    expected: Sequence[Expectation],
    probe: Probe,
    patience: Patience,
    chance: random.Random,
    limit: timedelta = SETTLE_LIMIT,
) -> Mapping[str, str]:
    """Return, by certificate id, why it is not shown everywhere it has to be; empty if all is well."""
    faults = _ask_until_right(expected, probe, patience, limit)
    for _ in range(ROUNDS - 1):
        again = chance.sample(expected, min(SAMPLE, len(expected)))
        faults |= _ask(again, probe)
    return faults


def _ask_until_right(
    expected: Sequence[Expectation], probe: Probe, patience: Patience, limit: timedelta
) -> dict[str, str]:
    faults: dict[str, str] = {}

    def all_right() -> bool:
        wrong = [one for one in expected if one.certificate_id in faults] if faults else expected
        faults.clear()
        faults.update(_ask(wrong, probe))
        return not faults

    patience.until(all_right, limit)
    return faults


def _ask(expected: Iterable[Expectation], probe: Probe) -> dict[str, str]:
    faults = {}
    for one in expected:
        seen = probe(one.port, one.dns_name)
        if seen.fingerprint != one.fingerprint:
            shown = seen.fault or f"leaf {seen.fingerprint}"
            faults[one.certificate_id] = f"port {one.port} shows {shown} for {one.dns_name}"
    return faults
