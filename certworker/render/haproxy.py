"""A snapshot as HAProxy syntax, for HAProxy 2.6 and later.

Values stand in single quotes, in which HAProxy expands nothing, and patterns come after `--`, so
that none of them is read as a flag. Names are made from ids only.

Sources: HAProxy 2.6 configuration manual §2.2 (quoting), §4.2, §5.1 (crt-list), §7 (ACLs); RFC 8555
§8.3 (HTTP-01).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta

from certworker.core.patterns import replace_end
from certworker.core.snapshot import HealthCheck, Listener, Match, PathMatch, Pool, Responder, Route, Snapshot, Target
from certworker.render.files import (
    ALL_POLICIES,
    CHALLENGE_PATH,
    RenderedFile,
    RenderedFiles,
    ServedFile,
    check_folder,
    is_name,
    names_to_resolve,
)

CONFIG = "haproxy.cfg"

_CHALLENGE_PATTERN = r"^/\.well-known/acme-challenge/[A-Za-z0-9_-]{22,128}$"
"""A token has at least 128 bits, in base64url (RFC 8555 §8.3)."""
_END = r"\z"
"""The end of a path. `$` would let a newline stand behind it (PCRE2, pcre2pattern(3) "Circumflex and dollar")."""
SET_HOST = "    http-request set-var(txn.host) 'req.hdr(host),host_only,lower,rtrim(.)'"
_RESPONDER = "acme_responder"
_NO_ROUTE = "no_route"
_RESOLVERS = "system"

# A node that is told to reload must not keep old workers for days because of one websocket.
_HARD_STOP = "30m"
_MAX_FILES = 1 << 20
"""HAProxy's own default since 3.1."""


@dataclass(frozen=True, slots=True)
class HaproxyOptions:
    """What the machine decides, not the gateway's tables."""

    folder: str
    """Absolute; holds `run/` with the sockets, `lists/` with the crt-lists and `certs/`."""
    number: int
    """The version's number: the running proxy shows it, which proves what it runs."""
    ipv6: bool = True
    user: str | None = None
    group: str | None = None
    max_connections: int | None = None
    """None: HAProxy computes it from the limit on open files."""


def quote(value: str) -> str:
    """Return `value` as one HAProxy word in which nothing is expanded."""
    return "'" + value.replace("'", "'\\''") + "'"


def list_path(folder: str, policy_id: str | None) -> str:
    """Return where the crt-list of one policy, or of all of them, lies."""
    return f"{folder}/lists/{policy_id or ALL_POLICIES}.list"


def thumbprints_path(folder: str) -> str:
    """Return where the map of thumbprints by DNS name lies."""
    return f"{folder}/lists/thumbprints.map"


def render_thumbprints(thumbprints: Mapping[str, str]) -> bytes:
    """Print the map of thumbprints. HAProxy has no quoting here: both sides were checked before."""
    return "".join(f"{name} {thumbprint}\n" for name, thumbprint in sorted(thumbprints.items())).encode("ascii")


def render_crt_list(lines: Iterable[ServedFile]) -> bytes:
    """Print a crt-list. HAProxy has no quoting here: names and paths were checked before."""
    return "".join(f"{line.file} {' '.join(line.dns_names)}\n" for line in sorted(lines)).encode("ascii")


def render_haproxy(snapshot: Snapshot, options: HaproxyOptions) -> RenderedFiles:
    """Print the configuration of one version. The crt-lists that it names are not part of it."""
    check_folder(options.folder)
    text = "\n".join(_config(snapshot, options)) + "\n"
    return RenderedFiles({CONFIG: RenderedFile(text.encode("ascii"))})


def _config(snapshot: Snapshot, options: HaproxyOptions) -> Iterator[str]:
    yield from _global(options)
    yield from _defaults()
    if names_to_resolve(snapshot):
        yield from ("", f"resolvers {_RESOLVERS}", "    parse-resolv-conf")
    for listener in snapshot.listeners:
        yield ""
        yield from _tcp_frontend(listener, options) if listener.passes_bytes else _http_frontend(listener, options)
    yield from ("", f"backend {_RESPONDER}", *responder_servers(snapshot.responders))
    yield from ("", f"backend {_NO_ROUTE}")
    yield "    http-request return status 404 content-type 'text/plain' string 'no route'"
    yield from _backends(snapshot)


def _global(options: HaproxyOptions) -> Iterator[str]:
    yield "global"
    yield f"    description 'cfgver={options.number}'"
    yield f"    stats socket {options.folder}/run/admin.sock mode 600 level admin expose-fd listeners"
    yield f"    hard-stop-after {_HARD_STOP}"
    yield "    ssl-default-bind-options ssl-min-ver TLSv1.2 no-tls-tickets"
    yield "    tune.ssl.default-dh-param 2048"
    # Containers often allow a billion open files, and HAProxy reserves memory for each.
    yield f"    fd-hard-limit {_MAX_FILES}"
    for keyword, value in (("user", options.user), ("group", options.group)):
        if value is not None:
            yield f"    {keyword} {quote(value)}"
    if options.max_connections is not None:
        yield f"    maxconn {options.max_connections}"


def _defaults() -> Iterator[str]:
    yield ""
    yield "defaults"
    yield "    mode http"
    # An upstream that died between two checks costs a retry, not a failed request.
    yield "    option redispatch 1"
    yield "    retries 2"
    # Measured: without it, a reload cuts off keep-alive clients in the middle of a request.
    yield "    option idle-close-on-response"
    yield "    option dontlognull"
    yield "    timeout connect 2s"
    yield "    timeout client 60s"
    yield "    timeout server 60s"
    yield "    timeout http-request 10s"
    yield "    timeout http-keep-alive 10s"
    yield "    timeout queue 10s"
    yield "    timeout client-fin 10s"
    yield "    timeout tunnel 1h"


def _bind(listener: Listener, options: HaproxyOptions) -> str:
    # Two sockets, not one for both: that one would report IPv4 clients as `::ffff:192.0.2.1`.
    # One line, so that the certificates are in memory once.
    address = f"0.0.0.0:{listener.port}"
    if options.ipv6:
        address += f",[::]:{listener.port} v6only"
    if listener.protocol == "http":
        return f"    bind {address}"
    # strict-sni: an unknown name gets an alert, never another tenant's certificate. It also lets
    # the listener start before the first certificate has been issued.
    crt_list = list_path(options.folder, listener.tls_policy_id)
    return f"    bind {address} ssl crt-list {crt_list} strict-sni alpn h2,http/1.1"


def _tcp_frontend(listener: Listener, options: HaproxyOptions) -> Iterator[str]:
    yield f"frontend L_{listener.id}"
    yield "    mode tcp"
    yield "    no option idle-close-on-response"
    yield _bind(listener, options)
    yield "    timeout client 1h"
    for route in listener.routes:
        yield f"    default_backend {_backend(route)}"


def _http_frontend(listener: Listener, options: HaproxyOptions) -> Iterator[str]:
    yield f"frontend L_{listener.id}"
    yield _bind(listener, options)
    yield SET_HOST
    stateless = listener.challenge == "stateless"
    yield from challenge_rules(thumbprints_path(options.folder) if stateless else None)
    # Set, not appended: what a client claims about itself is not passed on.
    yield "    http-request set-header X-Forwarded-For %[src]"
    yield f"    http-request set-header X-Forwarded-Proto {listener.protocol}"
    yield "    http-request set-var(txn.path) path,url_dec"
    yield "    acl is_ws req.hdr(upgrade) -m str -i -- websocket"
    if listener.challenge == "forward":
        yield f"    use_backend {_RESPONDER} if acme_path"
    for number, route in enumerate(listener.routes, start=1):
        yield from _route(f"r{number}", route)
    yield f"    default_backend {_NO_ROUTE}"


def challenge_rules(thumbprints: str | None) -> Iterator[str]:
    """Answer HTTP-01 from a map, or stop what only looks like it, so that the rest can go to the responders.

    `thumbprints` is the map's path, None where the responders answer (RFC 8555 §8.3). HAProxy runs every
    http-request rule before any use_backend; of these the challenge's is first.
    """
    yield f"    acl acme_path path -m beg -- {quote(CHALLENGE_PATH)}"
    yield f"    acl acme_token path -m reg -- {quote(_CHALLENGE_PATTERN)}"
    plain = "content-type 'text/plain' hdr Cache-Control no-store"
    yield (
        f"    http-request return status 405 {plain} hdr Allow 'GET, HEAD' string 'GET or HEAD only'"
        " if acme_path !{ method GET HEAD }"
    )
    yield f"    http-request return status 404 {plain} string 'no such challenge' if acme_path !acme_token"
    if thumbprints is not None:
        yield from _stateless_answer(thumbprints, plain)


def _stateless_answer(thumbprints: str, plain: str) -> Iterator[str]:
    """Answer any token for the names that have a thumbprint, and for no others.

    A client that copies the token must check its alphabet (RFC 8555 §8.3): `acme_token` did.
    """
    yield f"    http-request set-var(txn.thumbprint) var(txn.host),map_str({thumbprints}) if acme_path"
    yield "    acl acme_name var(txn.thumbprint) -m found"
    yield (
        f"    http-request return status 200 {plain} hdr X-Content-Type-Options nosniff"
        " lf-string '%[path,field(4,/)].%[var(txn.thumbprint)]' if acme_path acme_name"
    )
    yield f"    http-request return status 404 {plain} string 'no such challenge' if acme_path"


def _route(name: str, route: Route) -> Iterator[str]:
    conditions = ["is_ws"] if route.type == "ws" else []
    for suffix, patterns in _patterns(route.match).items():
        yield from (f"    acl {name}_{suffix} var(txn.{suffix}) {pattern}" for pattern in patterns)
        conditions.append(f"{name}_{suffix}")
    yield f"    use_backend {_backend(route)}" + (f" if {' '.join(conditions)}" if conditions else "")


def _patterns(match: Match) -> Mapping[str, list[str]]:
    """Return, for each part of a request that has to match, the patterns of which one must."""
    patterns = {}
    if match.host is not None:
        patterns["host"] = [_host_pattern(match.host)]
    if match.path is not None:
        patterns["path"] = _path_patterns(match.path)
    return patterns


def _host_pattern(host: str) -> str:
    if host.startswith("*."):
        return f"-m reg -- {quote(f'^[^.]+{re.escape(host[1:])}$')}"
    return f"-m str -- {quote(host)}"


def _path_patterns(path: PathMatch) -> list[str]:
    if path.exact is not None:
        return [f"-m str -- {quote(path.exact)}"]
    if path.prefix is not None:
        if path.prefix.endswith("/"):
            return [f"-m beg -- {quote(path.prefix)}"]
        return [f"-m str -- {quote(path.prefix)}", f"-m beg -- {quote(path.prefix + '/')}"]
    whole = replace_end(path.regex or "", _END)
    return [f"-m reg -- {quote(f'^(?:{whole}){_END}')}"]


def _backend(route: Route) -> str:
    return f"P_{route.pool_id}_tcp" if route.type == "port" else f"P_{route.pool_id}"


def _backends(snapshot: Snapshot) -> Iterator[str]:
    """Print the pools that a route leads to, once for HTTP and once for whole connections."""
    used = {_backend(route) for listener in snapshot.listeners for route in listener.routes}
    for pool in snapshot.pools:
        for name, is_tcp in ((f"P_{pool.id}", False), (f"P_{pool.id}_tcp", True)):
            if name in used:
                yield ""
                yield from _pool(name, pool, is_tcp)


def _pool(name: str, pool: Pool, is_tcp: bool) -> Iterator[str]:
    yield f"backend {name}"
    if is_tcp:
        yield "    mode tcp"
        yield "    timeout server 1h"
    yield f"    balance {'leastconn' if pool.policy == 'least_conn' else 'roundrobin'}"
    if pool.check is not None:
        yield from _health_check(pool.check)
    for target in pool.targets:
        weight = 1 if pool.policy == "round_robin" else target.weight
        yield _server(f"t_{target.id}", target, f" weight {weight}" + (" check" if pool.check else ""))


def _health_check(check: HealthCheck) -> Iterator[str]:
    # Both limits: without `timeout check`, HAProxy gives the connect of a check the whole interval.
    yield f"    timeout connect {_ms(check.timeout)}"
    yield f"    timeout check {_ms(check.timeout)}"
    yield f"    default-server inter {_ms(check.interval)} fall 2 rise 1"


def responder_servers(responders: Iterable[Responder], resolvers: str = _RESOLVERS) -> Iterator[str]:
    """Try one responder after the other. Any of them can answer any challenge.

    They are not checked: one that has just started, for a single renewal, has to be reached at once.
    """
    servers = [_server(f"r{number}", one, "", resolvers) for number, one in enumerate(responders, start=1)]
    yield "    balance roundrobin"
    yield f"    retries {max(2, len(servers))}"
    yield "    timeout connect 1s"
    yield "    timeout server 10s"
    yield from servers


def _server(name: str, target: Target | Responder, settings: str, resolvers: str = _RESOLVERS) -> str:
    host = f"[{target.host}]" if ":" in target.host else target.host
    # A name is looked up while running: one that does not resolve must not stop the whole proxy.
    lookup = f" resolvers {resolvers} init-addr none" if is_name(target.host) else ""
    return f"    server {name} {host}:{target.port}{settings}{lookup}"


def _ms(duration: timedelta) -> str:
    return f"{duration // timedelta(milliseconds=1)}ms"
