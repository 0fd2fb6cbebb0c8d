"""What the operator's own HAProxy or nginx includes: the challenge route, and who answers which names.

Routes, pools and listeners are the operator's; of a snapshot only the responders are read, and how the plain listeners
answer challenges. No file comes and goes with them: one that is named and missing keeps a proxy from starting.

Sources: those of `render.haproxy` and `render.nginx`; HAProxy 2.6 configuration manual §4.1 (`from`).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

from certworker.core.snapshot import Listener, Snapshot
from certworker.render.files import ALL_POLICIES, CHALLENGE_PATH, ServedFile, check_folder, is_name
from certworker.render.haproxy import (
    SET_HOST,
    challenge_rules,
    quote,
    render_crt_list,
    render_thumbprints,
    responder_servers,
)
from certworker.render.nginx import block, challenge_lines, challenge_maps, responder_pool, responder_sockets
from certworker.render.nginx_lists import PairText, print_certificates
from certworker.render.nginx_lists import render_thumbprints as render_thumbprint_rows

MARK = "certworker"
"""Below CHALLENGE_PATH, for this machine only: says which files the proxy has read. No token is so short."""
BACKEND = "certworker_challenge"

_HAPROXY_SECTION = "certworker"
_LOOPBACK = ("127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class IncludedLists:
    """What changes more often than a version."""

    certificates: Mapping[str | None, frozenset[ServedFile]]
    """By policy; None: of all policies."""
    thumbprints: Mapping[str, str]
    """DNS name -> thumbprint of the account's key."""


def plain_listeners(snapshot: Snapshot) -> list[Listener]:
    """Return the listeners on which a CA asks first."""
    return [row for row in snapshot.listeners if row.protocol == "http" and not row.passes_bytes]


def crt_list_name(policy_id: str | None) -> str:
    """Name the crt-list of one policy, or of all of them."""
    return f"{policy_id or ALL_POLICIES}.list"


def certificates_name(policy_id: str | None) -> str:
    """Name what an nginx server includes to answer with the certificates of one policy, or of all of them."""
    return f"{policy_id or ALL_POLICIES}.certificates.conf"


def _is_stateless(snapshot: Snapshot) -> bool:
    # One route for all plain ports: where one of them has to answer without a responder, all do.
    return any(row.challenge == "stateless" for row in plain_listeners(snapshot))


def render_for_haproxy(snapshot: Snapshot, lists: IncludedLists, folder: str) -> dict[str, bytes]:
    """Print the files, by name, that HAProxy reads in `folder`; `mark` (`render_haproxy_mark`) is not among them."""
    check_folder(folder)
    return {
        "haproxy.cfg": _text(_haproxy_backend(snapshot, folder)),
        "thumbprints.map": render_thumbprints(lists.thumbprints),
        **{crt_list_name(policy_id): render_crt_list(lines) for policy_id, lines in lists.certificates.items()},
    }


def render_haproxy_mark(mark: str) -> dict[str, bytes]:
    """Print what HAProxy answers with when it is asked which files it has read."""
    return {"mark": f"{mark}\n".encode("ascii")}


def _haproxy_backend(snapshot: Snapshot, folder: str) -> Iterator[str]:
    yield "# Written by certworker. The last file that HAProxy loads: what comes after it would have its defaults."
    if any(is_name(responder.host) for responder in snapshot.responders):
        yield from (f"resolvers {_HAPROXY_SECTION}", "    parse-resolv-conf")
    # Defaults of our own: those of the operator's configuration may hold anything.
    yield from (f"defaults {_HAPROXY_SECTION}", "    mode http", "    timeout queue 10s")
    yield f"backend {BACKEND} from {_HAPROXY_SECTION}"
    yield SET_HOST
    mine = f"{{ path -m str -- {quote(CHALLENGE_PATH + MARK)} }} {{ src {' '.join(_LOOPBACK)} }}"
    yield f"    http-request set-log-level silent if {mine}"
    yield (
        "    http-request return status 200 content-type 'text/plain' hdr Cache-Control no-store"
        f" file {folder}/mark if {mine}"
    )
    yield from challenge_rules(f"{folder}/thumbprints.map" if _is_stateless(snapshot) else None)
    yield from responder_servers(snapshot.responders, _HAPROXY_SECTION)


def render_for_nginx(
    snapshot: Snapshot,
    lists: IncludedLists,
    folder: str,
    pairs: Mapping[str, PairText],
    addresses: Mapping[str, tuple[str, ...]],
) -> dict[str, bytes]:
    """Print the files, by name, that nginx reads in `folder`; `mark.conf` (`render_nginx_mark`) is not among them.

    `pairs` go by certificate file, and `addresses` are what the names of responders resolve to.
    """
    check_folder(folder)
    answers = {
        policy_id: print_certificates(policy_id, served, pairs) for policy_id, served in lists.certificates.items()
    }
    sockets = None if _is_stateless(snapshot) else responder_sockets(snapshot.responders, addresses)
    return {
        "http.conf": _text(_nginx_http(sockets or (), folder))
        + "".join(lines.maps for _, lines in sorted(answers.items(), key=lambda one: str(one[0]))).encode("ascii"),
        "challenge.conf": _text(_nginx_challenge(sockets)),
        "thumbprints.conf": render_thumbprint_rows(lists.thumbprints),
        **{certificates_name(name): lines.certificate.encode("ascii") for name, lines in answers.items()},
    }


def render_nginx_mark(mark: str) -> dict[str, bytes]:
    """Print what nginx answers with when it is asked which files it has read."""
    return {"mark.conf": "".join(f'{address} "{mark}";\n' for address in _LOOPBACK).encode("ascii")}


def _nginx_http(sockets: Iterable[str], folder: str) -> Iterator[str]:
    yield "# Written by certworker, to be included once, in http { }."
    yield from challenge_maps()
    yield from block("map $host $acme_thumbprint", ['default "";', f"include {folder}/thumbprints.conf;"])
    yield from block("map $remote_addr $certworker_mark", ['default "";', f"include {folder}/mark.conf;"])
    yield from responder_pool(sockets)


def _nginx_challenge(sockets: list[str] | None) -> Iterator[str]:
    yield "# Written by certworker, to be included in every server that answers on a plain port."
    yield from block(f"location ^~ {CHALLENGE_PATH}", ["rewrite ^ //acme last;"])
    mark = [
        "access_log off;",
        "default_type text/plain;",
        'if ($certworker_mark = "") { return 404; }',
        "return 200 $certworker_mark;",
    ]
    yield from block(f"location = {CHALLENGE_PATH}{MARK}", mark)
    # What the operator says around us is not meant for a CA: a password, who may come, what is sent along.
    ours = ["default_type text/plain;", "auth_basic off;", "allow all;", "proxy_set_header Host $host;"]
    yield from block("location = //acme", chain(ours, challenge_lines(sockets)))


def _text(lines: Iterable[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode("ascii")
