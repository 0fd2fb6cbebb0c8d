"""One version onto one proxy: validate, apply, verify, and back again if anything is wrong.

write the version's folder -> the proxy's own check -> preflight of new ports -> swap the symlink
-> start or reload -> verify; from the swap on, every refusal leads back to the version before.
"""

import errno
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from certworker.core.rollout import assign_names
from certworker.core.snapshot import Listener, Snapshot
from certworker.errors import NodeError, VersionRefused
from certworker.node.control import PublishedVersion
from certworker.node.folder import Folder
from certworker.node.probe import Expectation
from certworker.node.state import Held, Lists, State
from certworker.render.files import RenderedFiles, ServedFile


class Proxy(Protocol):
    """What an agent needs of a proxy, whichever it is."""

    managed: bool
    """Whether its process and all of its configuration are ours, and not the operator's."""

    @property
    def hint(self) -> str:
        """What a person can check when a certificate is not shown; empty if nobody but us configures the proxy."""

    def describe(self) -> str:
        """Return its name and version."""

    def render(self, snapshot: Snapshot, number: int) -> RenderedFiles:
        """Print a version for this machine."""

    def is_outdated(self) -> bool:
        """Say whether `render` would print the served version otherwise now than when it was taken over."""

    def write_lists(self, lists: Lists) -> None:
        """Write the files beside the version that the next check, start or reload reads."""

    def list_names(self, lists: Lists) -> frozenset[str]:
        """Return the names of these files."""

    def check_pair(self, file: str) -> None:
        """Raise `PairRefused` for a certificate's file, unless `check` will look at it."""

    def check(self, version: Path) -> tuple[str, ...]:
        """Return the proxy's own remarks on a version's folder, or raise `CheckRefused`."""

    def running(self) -> bool: ...
    def start(self) -> None: ...
    def reload(self) -> None: ...
    def stop(self) -> None: ...

    def why_not_served(self, number: int) -> str | None:
        """Say why the running proxy is not known to have taken version `number` over; None: it has."""

    def serves(self, lists: Lists) -> bool:
        """Say whether the running proxy has exactly these lists."""

    def swap(self, before: Lists, after: Lists) -> None:
        """Take over lists without a reload, or raise `CommandRefused`."""

    def tidy(self) -> None: ...


def plan_lists(state: State) -> Lists:
    """Return what the listeners of the state's version need to know of its certificates and thumbprints."""
    if state.version is None:
        return Lists()
    listeners = state.version.snapshot.listeners
    policies = {row.tls_policy_id for row in listeners if row.protocol == "https"}
    stateless = any(_answers_challenges(row) for row in listeners)
    return Lists(
        {policy_id: _lines(state.held, policy_id) for policy_id in policies}, state.thumbprints if stateless else None
    )


def _lines(held: Held, policy_id: str | None) -> frozenset[ServedFile]:
    assigned = assign_names(held.values(), policy_id)
    return frozenset(ServedFile(held[certificate_id].file, names) for certificate_id, names in assigned.items())


def _answers_challenges(listener: Listener) -> bool:
    return listener.challenge == "stateless" and not listener.passes_bytes


def challenge_ports(version: PublishedVersion | None) -> list[int]:
    """Return the ports of the http listeners that answer challenges by themselves."""
    listeners = () if version is None else version.snapshot.listeners
    return [row.port for row in listeners if row.protocol == "http" and _answers_challenges(row)]


def expect(version: PublishedVersion | None, held: Held, only: Iterable[str]) -> list[Expectation]:
    """Return what the listeners of `version` have to show of the certificates in `only`."""
    if version is None:
        return []
    expected = []
    for listener in (row for row in version.snapshot.listeners if row.protocol == "https"):
        assigned = assign_names(held.values(), listener.tls_policy_id)
        for certificate_id in sorted(assigned.keys() & set(only)):
            fingerprint = held[certificate_id].fingerprint
            names = assigned[certificate_id]
            expected += [Expectation(certificate_id, listener.port, name, fingerprint) for name in names]
    return expected


def stage_version(folder: Folder, proxy: Proxy, version: PublishedVersion) -> Path:
    """Write the folder of `version`, which nothing refers to yet, and return it."""
    return folder.write_version(version.folder_name, proxy.render(version.snapshot, version.number))


def switch_version(
    folder: Folder,
    proxy: Proxy,
    new: PublishedVersion,
    old: PublishedVersion | None,
    verify: Callable[[], None],
) -> None:
    """Make `proxy` serve the staged and checked `new`, or raise `VersionRefused` with `old` served."""
    running = proxy.running()
    try:
        if old is not None or not running:  # else a proxy that we know nothing of may hold the ports
            preflight(_ports(new) - (_ports(old) if running else set()))
    except NodeError as refused:
        raise VersionRefused(f"version {new.number} is not applied: {refused}") from refused
    try:
        _switch(folder, proxy, new)
        verify()
    except NodeError as refused:
        raise VersionRefused(
            f"version {new.number} is not served: {refused}; {_back(folder, proxy, old, running)}"
        ) from refused


def _switch(folder: Folder, proxy: Proxy, version: PublishedVersion) -> None:
    folder.point_at(version.folder_name)
    if proxy.running():
        proxy.reload()
    else:
        proxy.start()
    if (why := proxy.why_not_served(version.number)) is not None:
        raise NodeError(why)


def _back(folder: Folder, proxy: Proxy, old: PublishedVersion | None, was_running: bool) -> str:
    """Return to the version before, and say how that went."""
    if old is None:
        folder.point_at(None)
        if was_running:
            return "the proxy that ran here before is left as it is"
        proxy.stop()
        return "no version is served"
    try:
        _switch(folder, proxy, old)
    except NodeError as refused:
        return f"nor could version {old.number} be restored: {refused}"
    return f"version {old.number} is served"


def hand_over(folder: Folder, proxy: Proxy, new: PublishedVersion, old: PublishedVersion | None) -> None:
    """Make an operator's own proxy read the staged and checked `new`, or raise `VersionRefused` with `old` back.

    Its ports are not ours to try, and what it shows is proved afterwards: its configuration may not name our files yet.
    """
    folder.point_at(new.folder_name)
    try:
        proxy.reload()
    except NodeError as refused:
        folder.point_at(None if old is None else old.folder_name)
        raise VersionRefused(f"version {new.number} is not served: {refused}") from refused


def ignored_rows(version: PublishedVersion | None) -> tuple[str, ...]:
    """Say which rows of `version` have no effect where the proxy is the operator's own."""
    if version is None:
        return ()
    snapshot = version.snapshot
    routes = sum(len(row.routes) for row in snapshot.listeners)
    if not routes and not snapshot.pools:
        return ()
    ignored = f"{routes} routes and {len(snapshot.pools)} upstream pools have no effect here"
    return (f"{ignored}: the proxy is the operator's own, and routes what its configuration says",)


def _ports(version: PublishedVersion | None) -> set[int]:
    return set() if version is None else {listener.port for listener in version.snapshot.listeners}


def preflight(ports: Iterable[int]) -> None:
    """Raise `NodeError` for a port that cannot be listened on; no proxy's own check looks at that."""
    for port in sorted(ports):
        for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):  # noqa: S104
            _try_to_bind(family, address, port)


def _try_to_bind(family: socket.AddressFamily, address: str, port: int) -> None:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                trial.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            trial.bind((address, port))
    except PermissionError:
        raise NodeError(f"port {port}: not allowed, give the proxy CAP_NET_BIND_SERVICE") from None
    except OSError as failed:
        if failed.errno == errno.EADDRINUSE:
            raise NodeError(f"port {port}: another process listens on it, stop that one or choose a port") from None
        if family == socket.AF_INET:  # a machine without IPv6 is no reason to refuse a port
            raise NodeError(f"port {port}: {failed}") from None
