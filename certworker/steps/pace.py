"""How soon a CA is done with its work, learnt from when it was.

A look that comes too soon is a request for nothing, one that comes late is time lost, and CAs need anything
from a few milliseconds to many seconds. RFC 8555 leaves it to the client when the CA does not say
(`Retry-After`, §7.4 and §7.5.1).
"""

from dataclasses import dataclass
from datetime import timedelta

from certworker.core.issuance import Patience, wait_for

_SOONER, _LATER = 0.97, 1.25
"""What becomes of the first wait after a look that was in time, or too soon: about one in nine is too soon then."""
_AT_ONCE = 0.5
"""To so much of it the first wait falls at most by what was in time after it."""
_FIRST = timedelta(milliseconds=40)
_LEAST, _MOST = timedelta(milliseconds=2), timedelta(seconds=4)


class Pace:
    """Of one kind of work; shared by all threads, none of which minds an update that was lost."""

    def __init__(self) -> None:
        self._first = _FIRST

    def wait(self, looks: int) -> timedelta:
        """Return how long to wait after so many looks that were too soon."""
        return wait_for(None, looks, Patience(first=self._first, growth=2.0))

    def learn(self, looks: int, waited: timedelta) -> None:
        """Note how many looks it took until the work was done, the first of them after having `waited`.

        Of hundreds that waited as long at the same time, none knew what the others found: together they are one
        step away from there, or a CA that is busy for a moment would be waited for until `_MOST`.
        """
        if looks <= 1:
            first = min(self._first, max(self._first * _SOONER, waited * _AT_ONCE))
        else:
            first = max(self._first, waited * _LATER)
        self._first = min(max(first, _LEAST), _MOST)


@dataclass(frozen=True, slots=True)
class Paces:
    """What a CA is waited for."""

    verdict: Pace
    """From its fetch of the token to the order that is ready."""
    certificate: Pace
    """From finalize to the order that is valid."""
