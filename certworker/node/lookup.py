"""What the names of upstreams resolve to, for a proxy that looks them up only when it starts.

As the machine resolves them, `/etc/hosts` included, and in the background: a DNS that does not answer
keeps no node from its work. What was found once stays until something else is found.
"""

import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from certworker.core.addresses import check_target_host
from certworker.node.folder import write_file
from certworker.node.patience import Patience

REFRESH = timedelta(seconds=10)
FIRST_LIMIT = timedelta(seconds=2)
"""How long a name that was never looked up is waited for."""

_ADDRESSES = TypeAdapter(dict[str, tuple[str, ...]])

Resolve = Callable[[str], tuple[str, ...]]


def resolve(host: str) -> tuple[str, ...]:
    """Return the addresses of `host` that an upstream may have, sorted, or raise `OSError`."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    return tuple(sorted({str(address[0]) for *_, address in found if _may_be_upstream(str(address[0]))}))


def _may_be_upstream(address: str) -> bool:
    # Whoever has a name can let it point at a cloud's metadata service. Ports are not known here: see `render.nginx`.
    try:
        return check_target_host(address) == address
    except ValueError:
        return False


def save_addresses(path: Path, found: Mapping[str, tuple[str, ...]]) -> None:
    """Keep what was found for the next start: a DNS that is away then takes nothing away."""
    write_file(path, _ADDRESSES.dump_json(dict(found)))


def load_addresses(path: Path) -> dict[str, tuple[str, ...]]:
    """Return what was saved, without names that had no address; nothing if there is no such file."""
    try:
        found = _ADDRESSES.validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return {}
    return {host: addresses for host, addresses in found.items() if addresses}


class Lookup:
    """The addresses of some names."""

    def __init__(self, patience: Patience, resolve: Resolve = resolve, refresh: timedelta = REFRESH) -> None:
        self._patience = patience
        self._resolve = resolve
        self._refresh = refresh
        self._found: dict[str, tuple[str, ...]] = {}
        self._due_at: dict[str, float] = {}
        """By the monotonic clock; infinite while a name is being looked up."""

    def remember(self, found: Mapping[str, tuple[str, ...]]) -> None:
        """Take over what was found before this process started."""
        self._found = {**found, **self._found}

    def addresses(self, hosts: Iterable[str], limit: timedelta = FIRST_LIMIT) -> Mapping[str, tuple[str, ...]]:
        """Return what is known of `hosts`, none for a name that could not be resolved yet."""
        wanted = sorted(set(hosts))
        for host in wanted:
            if self._due_at.get(host, 0) <= self._patience.monotonic():
                self._due_at[host] = float("inf")
                # A thread may hang in the C library for long, so that none may be waited for at the end.
                threading.Thread(target=self._look_up, args=(host,), daemon=True).start()
        self._patience.until(lambda: all(host in self._found for host in wanted), limit)
        return {host: self._found.get(host, ()) for host in wanted}

    def _look_up(self, host: str) -> None:
        try:
            self._found[host] = self._resolve(host)
        except (OSError, UnicodeError):
            self._found.setdefault(host, ())
        self._due_at[host] = self._patience.monotonic() + self._refresh.total_seconds()
