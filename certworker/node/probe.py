"""Proof: what a client of the local proxy is really shown, and what a CA that asks it would be told.

Every handshake has a fresh context: a resumed session would show the certificate of the first one.
"""

import hashlib
import http.client
import random
import socket
import ssl
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from certworker.node.patience import Patience
from certworker.render.files import CHALLENGE_PATH

ROUNDS = 3
"""One good answer may come from a worker that is about to leave."""
SAMPLE = 20
"""How many of many are asked again in the rounds after the first."""
HANDSHAKE_LIMIT = timedelta(seconds=3)
_MAX_ANSWER = 1024
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


@dataclass(frozen=True, slots=True)
class ExpectedAnswer:
    """What a listener has to answer to any challenge for a name."""

    port: int
    dns_name: str
    thumbprint: str


Probe = Callable[[int, str], Seen]
T = TypeVar("T")


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

    def find_fault(one: Expectation) -> str | None:
        seen = probe(one.port, one.dns_name)
        if seen.fingerprint == one.fingerprint:
            return None
        return f"port {one.port} shows {seen.fault or f'leaf {seen.fingerprint}'} for {one.dns_name}"

    faulty = _ask_until_right(expected, find_fault, patience, limit)
    for _ in range(ROUNDS - 1):
        faulty |= _ask(chance.sample(expected, min(SAMPLE, len(expected))), find_fault)
    return {one.certificate_id: fault for one, fault in faulty.items()}


def prove_answers(
    expected: Sequence[ExpectedAnswer], patience: Patience, chance: random.Random, limit: timedelta = SETTLE_LIMIT
) -> Mapping[str, str]:
    """Return, by DNS name, why challenges for it are not answered as they have to be; empty if all is well.

    All rows of the map come and go together, so of many a sample is asked, and all only if one of it is wrong.
    """

    def find_fault(one: ExpectedAnswer) -> str | None:
        token = f"{chance.getrandbits(256):064x}"
        answer = ask_challenge(one.port, one.dns_name, token)
        if answer == f"{token}.{one.thumbprint}":
            return None
        return f"port {one.port} answers a challenge for {one.dns_name} with {answer[:100]!r}"

    faulty = _ask_until_right(chance.sample(expected, min(SAMPLE, len(expected))), find_fault, patience, limit)
    if faulty:
        faulty = _ask(expected, find_fault)
    return {one.dns_name: fault for one, fault in faulty.items()}


def ask_challenge(port: int, dns_name: str, token: str, limit: timedelta = HANDSHAKE_LIMIT) -> str:
    """Return what the local listener on `port` answers to a challenge for `dns_name`, or what went wrong."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=limit.total_seconds())
    try:
        connection.request("GET", CHALLENGE_PATH + token, headers={"Host": dns_name, "Connection": "close"})
        answer = connection.getresponse()
        body = answer.read(_MAX_ANSWER).decode("ascii", "replace")
    except (OSError, http.client.HTTPException) as failed:
        return str(failed) or type(failed).__name__
    finally:
        connection.close()
    return body if answer.status == http.HTTPStatus.OK else f"status {answer.status}"


def _ask_until_right(
    expected: Sequence[T], find_fault: Callable[[T], str | None], patience: Patience, limit: timedelta
) -> dict[T, str]:
    faulty: dict[T, str] = {}

    def all_right() -> bool:
        wrong = list(faulty) or expected
        faulty.clear()
        faulty.update(_ask(wrong, find_fault))
        return not faulty

    patience.until(all_right, limit)
    return faulty


def _ask(expected: Iterable[T], find_fault: Callable[[T], str | None]) -> dict[T, str]:
    return {one: fault for one in expected if (fault := find_fault(one)) is not None}
