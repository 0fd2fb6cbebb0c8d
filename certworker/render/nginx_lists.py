"""What nginx is told beside its version: which certificate answers which names, and thumbprints.

Certificates and keys are `data:` values of maps, which the master reads; its workers never open a key.
Values stand in double quotes. Where nginx would expand a `$`, which cannot be escaped, a value with
one is refused.

Sources: nginx's documentation of its map and ssl modules; `ngx_http_map_module.c` for keys that are
words of nginx's own, `ngx_conf_file.c` for the longest word.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain

from certworker.errors import InputError
from certworker.render.files import ALL_POLICIES, ServedFile

THUMBPRINTS = "thumbprints.conf"
MARK = "mark.conf"
"""Says which lists a process has read: it sets `$lists`, which the version's socket answers with."""

_MAX_VALUE = 3500
"""nginx reads no word of more than 4,096 bytes, so that a long chain has to come in parts."""


def quote(value: str) -> str:
    """Return `value` as one word of nginx, for a place where nothing is expanded."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def literal(value: str) -> str:
    """Return `value` as one word for a place where variables are expanded, or raise `InputError`."""
    if "$" in value:
        raise InputError(f"nginx would expand the $ in {value[:80]!r}")
    return quote(value)


def maps_name(policy_id: str | None) -> str:
    """Name the file with the certificates of one policy, or of all of them."""
    return f"{policy_id or ALL_POLICIES}.maps.conf"


def server_name(policy_id: str | None) -> str:
    """Name the file with what an https server says of its names and certificates."""
    return f"{policy_id or ALL_POLICIES}.server.conf"


def render_mark(digest: str) -> bytes:
    """Print the mark of the lists with this digest."""
    return f"set $lists {literal(digest)};\n".encode("ascii")


def render_thumbprints(thumbprints: Mapping[str, str]) -> bytes:
    """Print the rows of the map of thumbprints by DNS name."""
    rows = (f"{_key(name)} {literal(thumbprint)};\n" for name, thumbprint in sorted(thumbprints.items()))
    return "".join(rows).encode("ascii")


@dataclass(frozen=True, slots=True)
class PairText:
    """A certificate and its key as PEM."""

    chain: str
    """Leaf first."""
    key: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class CertificateLines:
    """What nginx reads of one list."""

    maps: str
    """For `http`: from an SNI name to the parts of its certificate and key."""
    names: str
    certificate: str
    """For a `server`: what answers, by these maps."""


def print_certificates(
    policy_id: str | None, served: Iterable[ServedFile], pairs: Mapping[str, PairText]
) -> CertificateLines:
    """Print one list: which name is answered with which of the `pairs`, which go by file."""
    lines = sorted(served)
    prefix = f"$c_{(policy_id or ALL_POLICIES).replace('-', '')}"
    chains = [_parts(pairs[line.file].chain) for line in lines]
    keys = [_parts(pairs[line.file].key) for line in lines]
    maps = [
        _map("$ssl_server_name", prefix, _names(lines)),
        *_part_maps(prefix, "chain", chains),
        *_part_maps(prefix, "key", keys),
    ]
    # An empty name first: it matches no SNI, and a request without Host gets it as its `$host`.
    names = " ".join(chain(['""'], (_server_name(name) for line in lines for name in line.dns_names)))
    certificate = [
        f'ssl_certificate "data:{_joined(prefix, "chain", chains)}";\n',
        f'ssl_certificate_key "data:{_joined(prefix, "key", keys)}";\n',
    ]
    return CertificateLines("".join(chain.from_iterable(maps)), f"server_name {names};\n", "".join(certificate))


def render_certificates(
    policy_id: str | None, served: Iterable[ServedFile], pairs: Mapping[str, PairText]
) -> Mapping[str, bytes]:
    """Print the files of one list, for a proxy of which all is ours."""
    lines = print_certificates(policy_id, served, pairs)
    return {
        maps_name(policy_id): lines.maps.encode("ascii"),
        server_name(policy_id): (lines.names + lines.certificate).encode("ascii"),
    }


def _key(name: str) -> str:
    """Return a DNS name as a key of a map: after a backslash, `default` and `include` are names too."""
    if name.startswith("*."):
        return quote(f"~*\\A{host_regex(name)}\\z")
    return quote(f"\\{name}")


def _names(lines: Iterable[ServedFile]) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(lines):
        yield from ((_key(name), str(number)) for name in line.dns_names)


def _part_maps(prefix: str, kind: str, values: list[list[str]]) -> Iterator[Iterator[str]]:
    """Print, for each part that any of the values has, the map from a certificate's number to it."""
    for part in range(_count_parts(values)):
        rows = [(str(number), quote(value[part])) for number, value in enumerate(values) if part < len(value)]
        yield _map(prefix, f"{prefix}_{kind}_{part}", rows)


def _map(source: str, result: str, rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    yield f'map {source} {result} {{\ndefault "";\n'
    yield from (f"{key} {value};\n" for key, value in rows)
    yield "}\n"


def _joined(prefix: str, kind: str, values: list[list[str]]) -> str:
    return "".join(f"{prefix}_{kind}_{part}" for part in range(_count_parts(values)))


def _count_parts(values: list[list[str]]) -> int:
    return max(map(len, values), default=1)


def _parts(pem: str) -> list[str]:
    if "$" in pem:
        raise InputError("nginx would expand the $ in a certificate's PEM")
    return [pem[start : start + _MAX_VALUE] for start in range(0, len(pem), _MAX_VALUE)]


def _server_name(name: str) -> str:
    # nginx's own `*.a.test` would match more than one label, which no certificate does.
    return quote(f"~\\A{host_regex(name)}\\z") if name.startswith("*.") else name


def host_regex(host: str, one: str = "[^.]") -> str:
    """Return a regex for a host, in which any `one` character may stand in the label of a wildcard."""
    return f"{one}+{re.escape(host[1:])}" if host.startswith("*.") else re.escape(host)
