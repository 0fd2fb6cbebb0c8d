"""Issuances that wait for the CA: entries in a heap, not threads."""

import heapq
from collections.abc import Iterator
from datetime import datetime
from itertools import count

from certworker.steps.session import Session


class Waiting:
    """Sessions by the time at which they go on; not for several threads at once."""

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}
        """By issuance id."""
        self._heap: list[tuple[datetime, int, str]] = []
        """Time, order of entry, issuance id; what is not the session's time any more is passed over."""
        self._entered = count()

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._sessions.values()))

    def __contains__(self, session: Session) -> bool:
        return self._sessions.get(session.issuance.id) is session

    def put(self, session: Session) -> None:
        """Let a session wait until its time; one that waits already gets its new time."""
        self._sessions[session.issuance.id] = session
        heapq.heappush(self._heap, (until(session), next(self._entered), session.issuance.id))

    def remove(self, session: Session) -> None:
        """Let it wait no more."""
        del self._sessions[session.issuance.id]

    def take(self, now: datetime) -> Session | None:
        """Take out the session that is due longest, None if none is due."""
        first = self.first()
        if first is None or first > now:
            return None
        return self._sessions.pop(heapq.heappop(self._heap)[2])

    def first(self) -> datetime | None:
        """Return when the next one is due."""
        while self._heap:
            at, _, issuance_id = self._heap[0]
            session = self._sessions.get(issuance_id)
            if session is not None and until(session) == at:
                return at
            heapq.heappop(self._heap)
        return None


def until(session: Session) -> datetime:
    """Return when a session goes on."""
    return session.wait_until or session.issuance.attempt_at
