"""How often one address may show a wrong token.

A token has 256 random bits, so nobody guesses one; what is bounded is the work that trying makes.
"""

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable

BURST = 10
"""Failures of one address at once: a machine that was removed, and a person who tries what was wrong."""
EVERY = 6.0
"""Seconds after which it may fail once more."""
_REMEMBERED = 4096
"""Addresses; the one that has been well-behaved for longest is forgotten first."""


class Failures:
    """Counts failures by client address. Belongs to one event loop."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._full_at: OrderedDict[str, float] = OrderedDict()
        """When an address has all of its burst back."""

    def wait(self, address: str) -> float:
        """Return for how many seconds this address is not listened to; 0 if it is."""
        full_at = self._full_at.get(_network(address), 0.0)
        return max(0.0, full_at - self._monotonic() - (BURST - 1) * EVERY)

    def note(self, address: str) -> None:
        """One more failure of this address."""
        now, network = self._monotonic(), _network(address)
        self._full_at[network] = max(now, self._full_at.pop(network, now)) + EVERY
        if len(self._full_at) > _REMEMBERED:
            self._full_at.popitem(last=False)


def _network(address: str) -> str:
    """Return what one host can send from: all of an IPv6 /64."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if parsed.version == 4:
        return str(parsed)
    return str(ipaddress.ip_network((parsed, 64), strict=False))
