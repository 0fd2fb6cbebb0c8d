"""What the fake CA keeps: accounts, orders, authorizations, and the ledger of what it issued."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cryptography import x509

from .fake_issuer import renewal_id
from .fake_jws import thumbprint

ORIGIN = "https://ca.test"
URN = "urn:ietf:params:acme:error:"


@dataclass(slots=True)
class FakeAccount:
    url: str
    jwk: Mapping[str, str]
    contact: Sequence[str]
    status: str = "valid"

    def show(self) -> str:
        """RFC 8555 §7.1.2."""
        return json.dumps({"status": self.status, "contact": list(self.contact), "orders": f"{self.url}/orders"})


@dataclass(slots=True)
class FakeAuthorization:
    url: str
    account: FakeAccount
    dns_name: str
    token: str
    expires_at: datetime
    status: str = "pending"
    challenge_status: str = "pending"
    error: Mapping[str, Any] | None = None

    def look(self, validate: Callable[[str, str], str | None]) -> None:
        """Do what was announced by answering the challenge (RFC 8555 §8.3)."""
        if self.challenge_status != "processing":
            return
        answer = validate(self.token, self.dns_name)
        self.status = "valid" if answer == f"{self.token}.{thumbprint(self.account.jwk)}" else "invalid"
        self.challenge_status = self.status
        if self.status == "invalid":
            code, detail = ("connection", "could not connect") if answer is None else ("unauthorized", "wrong content")
            self.error = {"type": URN + code, "detail": detail, "status": 403}

    def show(self) -> str:
        """RFC 8555 §7.1.4."""
        wildcard = self.dns_name.startswith("*.")
        # In this order, and without a token, is how Pebble lists a type that we do not know.
        unknown = {"type": "dns-persist-01", "url": f"{self.url}/other", "status": "pending"}
        shown = {
            "status": self.status,
            "expires": show_time(self.expires_at),
            "identifier": {"type": "dns", "value": self.dns_name.removeprefix("*.")},
            "challenges": [unknown] if wildcard else [unknown, self.challenge()],
        }
        return json.dumps({**shown, "wildcard": True} if wildcard else shown)

    def challenge(self) -> dict[str, Any]:
        """RFC 8555 §8.3."""
        shown = {
            "type": "http-01",
            "url": self.url.replace("/authorization/", "/challenge/"),
            "token": self.token,
            "status": self.challenge_status,
        }
        return {**shown, "error": self.error} if self.error else shown


@dataclass(slots=True)
class FakeOrder:
    url: str
    account: FakeAccount
    dns_names: Sequence[str]
    authorizations: Sequence[FakeAuthorization]
    expires_at: datetime
    profile: str | None = None
    replaces: str | None = None
    status: str = "pending"
    error: Mapping[str, Any] | None = None
    looks_left: int = 0
    """How often a look still says `processing`."""
    chain_pem: str = ""

    def advance(self) -> None:
        """Move to where the authorizations, and being looked at, have brought the order (RFC 8555 §7.1.6)."""
        statuses = {authorization.status for authorization in self.authorizations}
        if self.status == "pending" and statuses <= {"valid"}:
            self.status = "ready"
        elif self.status in ("pending", "ready") and statuses & {"invalid", "deactivated", "expired", "revoked"}:
            self.status = "invalid"
        elif self.status == "processing":
            self.status, self.looks_left = "processing" if self.looks_left else "valid", self.looks_left - 1

    def show(self) -> str:
        """RFC 8555 §7.1.3."""
        shown: dict[str, Any] = {
            "status": self.status,
            "expires": show_time(self.expires_at),
            "identifiers": [{"type": "dns", "value": name} for name in self.dns_names],
            "authorizations": [authorization.url for authorization in self.authorizations],
            "finalize": self.url.replace("/order/", "/finalize/"),
        }
        if self.status == "valid":
            shown["certificate"] = self.url.replace("/order/", "/certificate/")
        more = {"profile": self.profile, "replaces": self.replaces, "error": self.error}
        return json.dumps({**shown, **{name: value for name, value in more.items() if value is not None}})


@dataclass(frozen=True, slots=True)
class Issued:
    """One line of the ledger: a certificate that exists, whether or not anybody fetched it."""

    serial: int
    order_url: str
    dns_names: frozenset[str]
    certificate: x509.Certificate
    chain_pem: str
    profile: str | None
    replaces: str | None

    @property
    def renewal_id(self) -> str:
        """RFC 9773 §4.1."""
        return renewal_id(self.certificate)


@dataclass(frozen=True, slots=True)
class Seen:
    """One request, as far as it was understood."""

    method: str
    path: str
    payload: Any = None
    """The signed JSON; "" for a POST-as-GET, None where nothing was signed."""
    account_url: str | None = None


def show_time(at: datetime) -> str:
    """RFC 3339."""
    return f"{at.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
