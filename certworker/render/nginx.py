"""A snapshot as nginx syntax, for nginx 1.22 and later.

Every https listener is one `server`, whose names and certificates stand in files beside the version
(`nginx_lists`), and a second one that refuses the handshakes for all other names.

nginx chooses a `location` by rules of its own, so the routes of a listener are one `map` of regular
expressions, which are tried from top to bottom. Its result is the name of a location that begins with
two slashes: nginx merges those in what a client asks for, so that no client can ask for it.

Sources: nginx's documentation of its core, http core, map, proxy, rewrite, ssl, upstream and stream
modules; RFC 8555 §8.3 (HTTP-01); RFC 9112 §3.2.2 (Host).
"""

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import chain

from certworker.core.addresses import Reserved
from certworker.core.patterns import replace_end
from certworker.core.snapshot import Listener, PathMatch, Pool, Responder, Route, Snapshot, Target
from certworker.render.files import (
    CHALLENGE_PATH,
    RenderedFile,
    RenderedFiles,
    check_folder,
    is_name,
)
from certworker.render.nginx_lists import (
    MARK,
    THUMBPRINTS,
    host_regex,
    literal,
    maps_name,
    quote,
    server_name,
)

CONFIG = "nginx.conf"

_RESPONDERS = "acme_responders"
_HTTP2_DIRECTIVE = (1, 25, 1)
_KEEPALIVE_MIN_TIMEOUT = (1, 27, 4)
_CONNECT_LIMIT = timedelta(seconds=2)
_TCP = "_tcp"
"""Ends the name of a pool for whole connections: nginx shares no memory between them and requests."""
_ANY_HOST = "[^/]*"
_PATH_END = rf"(?=/[01]{_ANY_HOST}\z)"


@dataclass(frozen=True, slots=True)
class NginxOptions:
    """What the machine decides, not the gateway's tables."""

    folder: str
    """Absolute; holds `run/` with the sockets, and `lists/`."""
    number: int
    """The version's number: the running proxy shows it, which proves what it runs."""
    version: tuple[int, ...] = (1, 22)
    ipv6: bool = True
    user: str | None = None
    """Whom the workers run as; only a master that is root may choose."""
    stream_module: str | None = None
    """The file of the stream module, None if it is built in."""
    max_connections: int = 8192
    """Per worker, to clients and to upstreams."""
    addresses: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What the names of upstreams and responders resolve to. nginx itself looks a name up at its start only, and
    does not start if that fails."""
    reserved: tuple[str, ...] = ()
    """`host:port` of what no name of an upstream may lead to, besides the responders."""


def render_nginx(snapshot: Snapshot, options: NginxOptions) -> RenderedFiles:
    """Print the configuration of one version. The lists that it includes are not part of it."""
    check_folder(options.folder)
    # A name may come to lead to a place that nobody would be let write down.
    responders = responder_sockets(snapshot.responders, options.addresses)
    options = replace(options, reserved=(*options.reserved, *responders))
    text = "\n".join(_config(snapshot, options)) + "\n"
    return RenderedFiles({CONFIG: RenderedFile(text.encode("ascii"))})


def _config(snapshot: Snapshot, options: NginxOptions) -> Iterator[str]:
    streams = [listener for listener in snapshot.listeners if listener.passes_bytes]
    others = [(number, row) for number, row in enumerate(snapshot.listeners, start=1) if not row.passes_bytes]
    if streams and options.stream_module is not None:
        yield f"load_module {literal(options.stream_module)};"
    yield from _main(options)
    yield "http {"
    yield from _indent(_http_settings(options))
    yield from _indent(_pools(snapshot, (listener for _, listener in others), options, ""))
    yield from _indent(responder_pool(responder_sockets(snapshot.responders, options.addresses)))
    if any(listener.challenge == "stateless" for _, listener in others):
        yield from _indent(_included_map("$host", "$acme_thumbprint", f"{options.folder}/lists/{THUMBPRINTS}"))
    policies = {listener.tls_policy_id for _, listener in others if listener.protocol == "https"}
    for policy_id in sorted(policies, key=lambda one: one or ""):
        yield f"    include {options.folder}/lists/{maps_name(policy_id)};"
    yield from _indent(_version_server(options))
    for number, listener in others:
        yield from _indent(_http_listener(f"L{number}", listener, snapshot, options))
    yield "}"
    if streams:
        yield "stream {"
        yield from _indent(_pools(snapshot, streams, options, _TCP))
        for listener in streams:
            yield from _indent(_stream_server(listener, snapshot, options))
        yield "}"


def _indent(lines: Iterable[str]) -> Iterator[str]:
    return (f"    {line}" for line in lines)


def block(head: str, lines: Iterable[str]) -> Iterator[str]:
    """Print a block with its lines."""
    yield f"{head} {{"
    yield from _indent(lines)
    yield "}"


def _included_map(source: str, result: str, path: str) -> Iterator[str]:
    return block(f"map {source} {result}", ['default "";', f"include {path};"])


def _main(options: NginxOptions) -> Iterator[str]:
    if options.user is not None:
        yield f"user {literal(options.user)};"
    yield "daemon off;"
    yield f"pid {options.folder}/run/nginx.pid;"
    yield f"error_log {options.folder}/run/nginx.log warn;"
    yield "worker_processes auto;"
    # A node that is told to reload must not keep old workers for days because of one websocket.
    yield "worker_shutdown_timeout 30m;"
    yield f"worker_rlimit_nofile {2 * options.max_connections};"
    yield from block("events", [f"worker_connections {options.max_connections};"])


def _http_settings(options: NginxOptions) -> Iterator[str]:
    yield "access_log off;"
    yield "server_tokens off;"
    yield "default_type text/plain;"
    for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"):
        # Nothing is kept there; nginx makes these folders whenever it starts, and may not where it was built to.
        yield f"{kind}_temp_path {options.folder}/run/{kind};"
    yield "ssl_protocols TLSv1.2 TLSv1.3;"
    yield "ssl_session_cache shared:certworker:10m;"
    yield "ssl_session_tickets off;"
    # A bucket has to hold the longest name.
    for table in ("map", "server_names", "variables"):
        yield f"{table}_hash_max_size 262144;"
        yield f"{table}_hash_bucket_size 512;"
    yield "client_header_timeout 10s;"
    yield "keepalive_timeout 10s;"
    if options.version >= _KEEPALIVE_MIN_TIMEOUT:
        # Without it, a reload cuts off keep-alive clients that are just sending a request.
        yield "keepalive_min_timeout 3s;"
    yield from _passing_on()
    yield from _request_maps()


def _passing_on() -> Iterator[str]:
    """Pass requests and answers on as they come, whole and with few changes."""
    yield "client_max_body_size 0;"
    yield "proxy_request_buffering off;"
    yield "proxy_buffering off;"
    yield "proxy_redirect off;"
    yield "proxy_http_version 1.1;"
    yield "proxy_pass_header Server;"
    yield "proxy_pass_header Date;"
    # An upstream must not send a client's request on to the upstream of somebody else.
    yield "proxy_ignore_headers X-Accel-Redirect X-Accel-Limit-Rate X-Accel-Buffering X-Accel-Charset;"
    yield f"proxy_connect_timeout {_ms(_CONNECT_LIMIT)};"
    yield "proxy_read_timeout 60s;"
    yield "proxy_send_timeout 60s;"
    # An upstream that died costs a retry, not a failed request.
    yield "proxy_next_upstream error timeout;"
    yield "proxy_next_upstream_tries 3;"
    # The host that was matched, not a header that may differ from the request line.
    yield "proxy_set_header Host $host$host_port;"
    # A connection for each request: of one that is kept, nginx learns too late that the upstream has closed it.
    yield "proxy_set_header Connection $hop_connection;"
    yield "proxy_set_header Upgrade $hop_upgrade;"
    # Set, not appended: what a client claims about itself is not passed on.
    yield "proxy_set_header X-Forwarded-For $remote_addr;"
    yield "proxy_set_header X-Forwarded-Proto $scheme;"


def _request_maps() -> Iterator[str]:
    yield from block("map $http_upgrade $is_ws", ["default 0;", f"{quote('~*^websocket$')} 1;"])
    yield from block("map $is_ws $hop_connection", ["default close;", "1 upgrade;"])
    yield from block("map $is_ws $hop_upgrade", ['default "";', "1 websocket;"])
    port = quote(r"~(?<port>:[0-9]{1,5})\z")
    yield from block("map $http_host $host_port", ['default "";', f"{port} $port;"])
    yield from challenge_maps()


def challenge_maps() -> Iterator[str]:
    """Tell what is a challenge from what only looks like one."""
    method = quote(r"~\A(?:GET|HEAD)\z")
    yield from block("map $request_method $acme_allow", ['default "GET, HEAD";', f'{method} "";'])
    # The path as it was sent: a token has nothing to be decoded. It has at least 128 bits (RFC 8555 §8.3).
    token = quote(rf"~\A{re.escape(CHALLENGE_PATH)}(?<token>[A-Za-z0-9_-]{{22,128}})(?:\?|\z)")
    yield from block("map $request_uri $acme_token", ['default "";', f"{token} $token;"])


def _version_server(options: NginxOptions) -> Iterator[str]:
    return block(
        "server",
        [
            f"listen unix:{options.folder}/run/version.sock;",
            f"include {options.folder}/lists/{MARK};",
            f'return 200 "{options.number} $lists";',
        ],
    )


def _listens(listener: Listener, options: NginxOptions, settings: str = "") -> Iterator[str]:
    yield f"listen 0.0.0.0:{listener.port}{settings};"
    if options.ipv6:
        yield f"listen [::]:{listener.port}{settings};"


def _http_listener(name: str, listener: Listener, snapshot: Snapshot, options: NginxOptions) -> Iterator[str]:
    yield from _route_map(name, listener.routes)
    locations = list(_locations(name, listener, snapshot, options))
    if listener.protocol == "http":
        yield from block("server", chain(_listens(listener, options), ['server_name "";'], locations))
        return
    old_http2 = " http2" if options.version < _HTTP2_DIRECTIVE else ""
    http2 = [] if old_http2 else ["http2 on;"]
    # An unknown name gets an alert, never another tenant's certificate; 421 is for a known name in the handshake
    # and an unknown one in the request (RFC 9110 §15.5.20).
    refusing = _listens(listener, options, f" ssl{old_http2} default_server")
    yield from block("server", chain(refusing, http2, ["server_name _;", "ssl_reject_handshake on;", "return 421;"]))
    serving = _listens(listener, options, f" ssl{old_http2}")
    named = [f"include {options.folder}/lists/{server_name(listener.tls_policy_id)};"]
    yield from block("server", chain(serving, http2, named, locations))


def _route_map(name: str, routes: Iterable[Route]) -> Iterator[str]:
    """Print the routes in their order. What they are compared with is the path, a slash, whether it is an upgrade
    to a websocket, and the host, which has no slash in it.
    """
    rows = (f"{quote(_route_regex(route))} r{number};" for number, route in enumerate(routes, start=1))
    return block(f'map "$uri/$is_ws$host" ${name}_route', chain(["default none;"], rows))


def _route_regex(route: Route) -> str:
    upgrade = "1" if route.type == "ws" else "[01]"
    host = _ANY_HOST if route.match.host is None else host_regex(route.match.host, "[^./]")
    return rf"~{_path_regex(route.match.path)}/{upgrade}{host}\z"


def _path_regex(path: PathMatch | None) -> str:
    if path is None:
        return ""
    if path.exact is not None:
        return rf"\A{re.escape(path.exact)}"
    if path.prefix is not None:
        # On the border of a segment; a newline is a character like any other.
        return rf"\A{re.escape(path.prefix.removesuffix('/'))}" + ("(?s:/.*)" + "?" * (not path.prefix.endswith("/")))
    return rf"\A(?:{replace_end(path.regex or '', _PATH_END)})"


def _locations(name: str, listener: Listener, snapshot: Snapshot, options: NginxOptions) -> Iterator[str]:
    # Away at once: a location that passes requests on would redirect those for its path without the last slash.
    yield from block(f"location ^~ {CHALLENGE_PATH}", ["rewrite ^ //acme last;"])
    sockets = responder_sockets(snapshot.responders, options.addresses)
    yield from block("location = //acme", challenge_lines(None if listener.challenge == "stateless" else sockets))
    yield from block("location /", [f"rewrite ^ //${name}_route last;"])
    yield from block("location = //none", ["internal;", 'return 404 "no route";'])
    pools = {pool.id: pool for pool in snapshot.pools}
    for number, route in enumerate(listener.routes, start=1):
        yield from block(f"location = //r{number}", _location(route, pools[route.pool_id], options))


def challenge_lines(sockets: Collection[str] | None) -> Iterator[str]:
    """Answer HTTP-01 from a map, or let what is a challenge go to the responders' `sockets` (RFC 8555 §8.3)."""
    yield "internal;"
    yield "add_header Allow $acme_allow always;"
    yield "add_header Cache-Control no-store always;"
    yield "add_header X-Content-Type-Options nosniff always;"
    yield 'if ($acme_allow) { return 405 "GET or HEAD only"; }'
    yield 'if ($acme_token = "") { return 404 "no such challenge"; }'
    if sockets is None:
        yield 'if ($acme_thumbprint = "") { return 404 "no such challenge"; }'
        yield 'return 200 "$acme_token.$acme_thumbprint";'
    elif sockets:
        yield "proxy_hide_header Cache-Control;"
        yield "proxy_connect_timeout 1s;"
        yield "proxy_read_timeout 10s;"
        yield "proxy_next_upstream_tries 0;"
        yield f"proxy_pass http://{_RESPONDERS}$request_uri;"
    else:
        yield "return 503;"


def _location(route: Route, pool: Pool, options: NginxOptions) -> Iterator[str]:
    yield "internal;"
    if not _has_servers(pool, options):
        yield "return 503;"
        return
    if pool.check is not None:
        yield f"proxy_connect_timeout {_ms(pool.check.timeout)};"
    if route.type == "ws":
        yield "proxy_read_timeout 1h;"
        yield "proxy_send_timeout 1h;"
    yield f"proxy_pass http://P_{pool.id}$request_uri;"


def _stream_server(listener: Listener, snapshot: Snapshot, options: NginxOptions) -> Iterator[str]:
    (route,) = listener.routes
    (pool,) = (one for one in snapshot.pools if one.id == route.pool_id)
    lines = list(_listens(listener, options))
    if _has_servers(pool, options):
        lines += [
            f"proxy_connect_timeout {_ms(pool.check.timeout if pool.check else _CONNECT_LIMIT)};",
            "proxy_timeout 1h;",
            "proxy_half_close on;",
            f"proxy_pass P_{pool.id}{_TCP};",
        ]
    else:
        lines.append('return "";')  # closes the connection
    return block("server", lines)


def _pools(snapshot: Snapshot, listeners: Iterable[Listener], options: NginxOptions, suffix: str) -> Iterator[str]:
    """Print the pools that a route of these listeners leads to."""
    used = {route.pool_id for listener in listeners for route in listener.routes}
    for pool in snapshot.pools:
        if pool.id in used and _has_servers(pool, options):
            name = f"P_{pool.id}{suffix}"
            yield from block(f"upstream {name}", _pool(name, pool, options))


def _pool(name: str, pool: Pool, options: NginxOptions) -> Iterator[str]:
    # In memory that the workers share, so that they count together.
    yield f"zone {name} {64 + 2 * len(pool.targets)}k;"
    if pool.policy == "least_conn":
        yield "least_conn;"
    for target, socket in _servers(pool, options):
        weight = 1 if pool.policy == "round_robin" else target.weight
        yield f"server {socket} weight={weight} {_failures(pool)};"


def _failures(pool: Pool) -> str:
    # nginx makes no connections just to check: what fails twice for clients is left alone for an interval.
    if pool.check is None:
        return "max_fails=0"
    return f"max_fails=2 fail_timeout={math.ceil(pool.check.interval.total_seconds())}s"


def _has_servers(pool: Pool, options: NginxOptions) -> bool:
    return any(True for _ in _servers(pool, options))


def _servers(pool: Pool, options: NginxOptions) -> Iterator[tuple[Target, str]]:
    reserved = Reserved(options.reserved)
    for target in pool.targets:
        if target.weight > 0 or pool.policy == "round_robin":
            hosts = (host for host in _hosts(target, options.addresses) if not reserved.holds(host, target.port))
            yield from ((target, _socket(host, target.port)) for host in hosts)


def _hosts(place: Target | Responder, addresses: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    return addresses.get(place.host, ()) if is_name(place.host) else (place.host,)


def _socket(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def responder_sockets(responders: Iterable[Responder], addresses: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Return as `host:port` where challenges are answered; `addresses` are those of names."""
    return [_socket(host, one.port) for one in responders for host in _hosts(one, addresses)]


def responder_pool(sockets: Iterable[str]) -> Iterator[str]:
    """Try one responder after the other. Any of them can answer any challenge.

    None of them is ever left alone: one that has just started, for a single renewal, has to be reached at once.
    """
    servers = [f"server {socket} max_fails=0;" for socket in sockets]
    if servers:
        yield from block(f"upstream {_RESPONDERS}", servers)


def _ms(duration: timedelta) -> str:
    return f"{duration // timedelta(milliseconds=1)}ms"
