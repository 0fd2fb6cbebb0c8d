"""What a CA says about an order, its authorizations and their challenges (RFC 8555 §7.1).

These values are read from the CA's JSON by `ca.messages`; `core.issuance` decides from them. Fields
that a CA adds are dropped, a status that RFC 8555 does not know becomes `UNKNOWN`.
"""

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum

from certworker.errors import Problem as Problem


class OrderStatus(StrEnum):
    """RFC 8555 §7.1.6."""

    PENDING = "pending"
    READY = "ready"
    PROCESSING = "processing"
    VALID = "valid"
    INVALID = "invalid"
    UNKNOWN = "unknown"


class AuthorizationStatus(StrEnum):
    """RFC 8555 §7.1.6."""

    PENDING = "pending"
    VALID = "valid"
    INVALID = "invalid"
    DEACTIVATED = "deactivated"
    EXPIRED = "expired"
    REVOKED = "revoked"
    UNKNOWN = "unknown"


class ChallengeStatus(StrEnum):
    """RFC 8555 §7.1.6."""

    PENDING = "pending"
    PROCESSING = "processing"
    VALID = "valid"
    INVALID = "invalid"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Challenge:
    """RFC 8555 §8. Challenges of a type we do not know are kept, and never answered."""

    type: str
    url: str
    status: ChallengeStatus
    token: str = field(default="", repr=False)
    """Base64url, for a URL path and never for a log; "" where the challenge has none (dns-persist-01)."""
    error: Problem | None = None


@dataclass(frozen=True, slots=True)
class Authorization:
    """RFC 8555 §7.1.4."""

    url: str
    status: AuthorizationStatus
    dns_name: str
    challenges: tuple[Challenge, ...]
    expires_at: datetime | None = None
    wildcard: bool = False
    retry_after: timedelta | None = None
    """From the answer's Retry-After header, never negative."""

    def http01(self) -> Challenge | None:
        """Return the HTTP-01 challenge, if the CA offers one (RFC 8555 §8.3)."""
        return next((c for c in self.challenges if c.type == "http-01"), None)


@dataclass(frozen=True, slots=True)
class Order:
    """RFC 8555 §7.1.3."""

    url: str
    status: OrderStatus
    dns_names: frozenset[str]
    authorization_urls: tuple[str, ...]
    finalize_url: str
    certificate_url: str | None = None
    expires_at: datetime | None = None
    error: Problem | None = None
    profile: str | None = None
    retry_after: timedelta | None = None
    """From the answer's Retry-After header, never negative."""
