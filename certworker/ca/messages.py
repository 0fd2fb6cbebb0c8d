"""A CA's JSON as values of `core.order` and `core.renewal`, and the directory (RFC 8555 §7.1, RFC 9773 §4.2).

Robust in one direction only: what we do not know is dropped or kept as unknown, what we need and do not
find is an AnswerFault. `acme.messages` is stricter where CAs differ (one unknown status or identifier
type costs the whole answer) and ten times slower.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from hashlib import sha256
from typing import TypeVar
from urllib.parse import urljoin

from certworker.ca.fields import Fields, read_json
from certworker.ca.headers import read_retry_after
from certworker.ca.problems import clean_text, read_problem_object
from certworker.ca.transport import Response
from certworker.ca.urls import is_url
from certworker.core.certificate import MAX_CHAIN_BYTES
from certworker.core.order import (
    Authorization,
    AuthorizationStatus,
    Challenge,
    ChallengeStatus,
    Order,
    OrderStatus,
)
from certworker.core.renewal import RenewalInfo, Window
from certworker.errors import AnswerFault

_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,512}")
_WITH_KEY_AUTHORIZATION = {"http-01", "dns-01", "tls-alpn-01"}
_ENCODED = re.compile(r"[A-Za-z0-9+/=]{12,}")
_QUOTED = 200
"""Bytes: the beginning of a proxy's page."""
_S = TypeVar("_S", bound=StrEnum)


@dataclass(frozen=True, slots=True)
class Directory:
    """What a CA offers, and where (RFC 8555 §7.1.1)."""

    new_nonce: str
    new_account: str
    new_order: str
    revoke_cert: str
    key_change: str
    renewal_info: str | None = None
    """RFC 9773 §4.1."""
    terms_of_service: str | None = None
    """Mostly an https URL, but some CAs put other things here: to be shown as text, not as a link."""
    website: str | None = None
    caa_identities: tuple[str, ...] = ()
    profiles: Mapping[str, str] = field(default_factory=dict)
    """Name to description."""
    external_account_required: bool = False

    @property
    def urls(self) -> tuple[str, ...]:
        """Where its resources are."""
        named = (self.new_nonce, self.new_account, self.new_order, self.revoke_cert, self.key_change)
        return (*named, self.renewal_info) if self.renewal_info is not None else named


def read_directory(response: Response) -> Directory:
    """Read the answer to a request for the directory."""
    fields = _fields(response)
    meta = fields.member("meta") if fields.has("meta") else Fields(response.url, {})
    return Directory(
        new_nonce=fields.url("newNonce"),
        new_account=fields.url("newAccount"),
        new_order=fields.url("newOrder"),
        revoke_cert=fields.url("revokeCert"),
        key_change=fields.url("keyChange"),
        renewal_info=fields.url("renewalInfo").rstrip("/") if fields.has("renewalInfo") else None,
        terms_of_service=clean_text(meta.text("termsOfService")) if meta.has("termsOfService") else None,
        website=_shown_url(meta, "website", "https", "http"),
        caa_identities=tuple(str(v) for v in meta.entries("caaIdentities")) if meta.has("caaIdentities") else (),
        profiles=_profiles(meta),
        external_account_required=meta.flag("externalAccountRequired"),
    )


def read_order(response: Response, now: datetime, url: str | None = None) -> Order:
    """Read an order, at `url` or where the answer's Location says (RFC 8555 §7.1.3)."""
    fields = _fields(response)
    status = _status(fields, OrderStatus)
    identifiers = fields.members("identifiers")
    return Order(
        url=url or read_location(response),
        status=status,
        dns_names=frozenset(i.text("value").lower() for i in identifiers if i.text("type") == "dns"),
        authorization_urls=fields.urls("authorizations"),
        finalize_url=fields.url("finalize"),
        # RFC 8555 §7.1.3 has it optional; a valid order without it is of no use.
        certificate_url=fields.url("certificate") if status is OrderStatus.VALID or fields.has("certificate") else None,
        expires_at=fields.time("expires") if fields.has("expires") else None,
        error=read_problem_object(fields.raw("error")),
        profile=fields.text("profile") if fields.has("profile") else None,
        retry_after=read_retry_after(response.headers, now),
    )


def read_authorization(response: Response, now: datetime, url: str) -> Authorization:
    """Read an authorization (RFC 8555 §7.1.4)."""
    fields = _fields(response)
    identifier = fields.member("identifier")
    if identifier.text("type") != "dns":
        raise identifier.fault("type", "must be dns")
    return Authorization(
        url=url,
        status=_status(fields, AuthorizationStatus),
        dns_name=identifier.text("value").lower(),
        challenges=tuple(_challenge(each) for each in fields.members("challenges")),
        expires_at=fields.time("expires") if fields.has("expires") else None,
        wildcard=fields.flag("wildcard"),
        retry_after=read_retry_after(response.headers, now),
    )


def read_challenge(response: Response) -> Challenge:
    """Read a challenge, the answer to having responded to one (RFC 8555 §7.5.1)."""
    return _challenge(_fields(response))


def read_renewal_info(response: Response, now: datetime) -> RenewalInfo:
    """Read what the CA says of a certificate's renewal (RFC 9773 §4.2)."""
    fields = _fields(response)
    window = fields.member("suggestedWindow")
    # Whole seconds are all that a CA can mean, and the same window is the same again when it comes back.
    start, end = (window.time(name).replace(microsecond=0) for name in ("start", "end"))
    if end <= start:
        raise window.fault("end", "must be later than start")
    return RenewalInfo(
        window=Window(start, end),
        explanation_url=_shown_url(fields, "explanationURL", "https"),
        retry_after=read_retry_after(response.headers, now),
    )


def read_location(response: Response) -> str:
    """Return where the thing that was made is found, or raise AnswerFault."""
    location = response.headers.get("location", "")
    url = urljoin(response.url, location) if location.startswith("/") else location
    if not is_url(url, response.url.partition(":")[0]):
        raise AnswerFault(response.url, "its Location is " + ("no URL to use" if location else "missing"))
    return url


def read_chain(response: Response) -> str:
    """Return a certificate chain as PEM text; what is in it is checked elsewhere (RFC 8555 §9.1)."""
    if b"-----BEGIN " not in response.body or not response.body.isascii():
        kind = response.headers.get("content-type", "")[:100] or "no content type"
        raise AnswerFault(response.url, f"it holds no PEM ({kind!a}); {quote_damaged(response.body)}")
    return response.body.decode("ascii")


def quote_damaged(body: bytes) -> str:
    """Return what is told, and so kept, of a chain that cannot be read: by this its CA can find out what it sent.

    What might be a certificate, and so might be a key instead, is left out.
    """
    start = clean_text(_ENCODED.sub("[...]", body[:MAX_CHAIN_BYTES].decode("ascii", "replace")), _QUOTED)
    return f"{len(body)} bytes, SHA-256 {sha256(body).hexdigest()}, {start!a}"


def _challenge(fields: Fields) -> Challenge:
    kind = fields.text("type")
    token = fields.raw("token")
    well_formed = isinstance(token, str) and _TOKEN.fullmatch(token) is not None
    if kind in _WITH_KEY_AUTHORIZATION and not well_formed:
        # It becomes part of a path that the proxies serve, so nothing else is let in (RFC 8555 §8.1).
        raise fields.fault("token", "must be base64url")
    return Challenge(
        type=kind,
        url=fields.url("url"),
        status=_status(fields, ChallengeStatus),
        token=str(token) if well_formed else "",
        error=read_problem_object(fields.raw("error")),
    )


def _fields(response: Response) -> Fields:
    return Fields(response.url, read_json(response.url, response.body, response.headers.get("content-type", "")))


def _status(fields: Fields, statuses: type[_S]) -> _S:
    try:
        return statuses(fields.text("status"))
    except ValueError:
        return statuses("unknown")


def _shown_url(fields: Fields, name: str, *schemes: str) -> str | None:
    """A URL that is only shown to people: a bad one is no reason to refuse the answer."""
    value = fields.raw(name)
    return value if isinstance(value, str) and is_url(value, *schemes) else None


def _profiles(meta: Fields) -> dict[str, str]:
    offered = meta.raw("profiles")
    return {str(name): str(text) for name, text in offered.items()} if isinstance(offered, Mapping) else {}
