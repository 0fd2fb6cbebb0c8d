"""An ACME server in memory that stands behind `ca.transport.Http`: what the CA can do, without a network.

It keeps to RFC 8555 as Pebble does (finalize answers `processing`, unknown challenge types, one nonce
one use) and is deterministic: nothing happens between two requests. Everything a test may want to read
or change is public; `fail_next` scripts what goes wrong.

    ca = FakeCa(lambda: NOW, validate=lambda token, dns_name: answers.get(token))
    client = Client(ca.directory_url, ca.http, ca.now)
    ca.fail_next("POST", "/finalize/*", raises=TransportFault("reset", "", ""), after=True)
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from hashlib import sha256
from threading import RLock
from typing import Any, Literal
from urllib.parse import urlsplit

from cryptography import x509

from certworker.ca.transport import ANSWER_LIMIT, Http, Response
from certworker.errors import AnswerFault, CaError

from . import fake_jws
from .fake_issuer import base64url, issue, make_hierarchy, to_pem
from .fake_state import ORIGIN, URN, FakeAccount, FakeAuthorization, FakeOrder, Issued, Seen, show_time


@dataclass(slots=True)
class _Fault:
    method: str
    path: str
    answer: Callable[[str], Response]
    after: bool
    skip: int
    times: int


class _Refused(Exception):
    """The request gets a problem document."""

    def __init__(self, status: int, code: str, detail: str, **more: Any) -> None:
        super().__init__(detail)
        self.status = status
        self.document = {"type": URN + code, "detail": detail, "status": status, **more}


def unreachable(token: str, dns_name: str) -> str | None:
    """Be a name behind whose port 80 nobody listens."""
    return None


@dataclass(kw_only=True, eq=False)
class _Knobs:
    validate: Callable[[str, str], str | None] = unreachable
    """Says what the responder answered for this token and name; None if it could not be reached."""
    validate_on: Literal["answer", "look"] = "answer"
    """Whether the CA looks while the challenge is being answered, or at the next look at the authorization or order."""
    processing_looks: int = 1
    """How many answers, that to finalize included, say `processing` before `valid`; 0 is a CA that issues at once."""
    retry_after: str | None = None
    """The Retry-After of pending and processing answers."""
    reuse_authorizations: bool = False
    profiles: Mapping[str, timedelta] = field(default_factory=dict)
    """Name to lifetime."""
    lifetime: timedelta = timedelta(days=90)
    terms: str | None = None
    eab_keys: Mapping[str, bytes] = field(default_factory=dict)
    """Any makes a binding compulsory."""
    refused_names: frozenset[str] = frozenset()
    """Names that newOrder rejects, each with a subproblem."""
    informs: bool = True
    """Whether the directory offers renewalInfo; without it `replaces` is not understood either."""
    renewal_windows: dict[str, tuple[datetime, datetime]] = field(default_factory=dict)
    """Windows by renewal id, also of certificates that were never issued; else it is the last third of the life."""
    renewal_retry_after: str | None = "21600"
    explanation_url: str | None = None
    replaced_by: Literal["certificate", "order"] = "certificate"
    """What makes a second order with the same `replaces` fail: a certificate (Pebble), or an order that may
    still lead to one (Boulder)."""


class FakeCa(_Knobs):
    """The server; its settings (`_Knobs`) may be changed at any time. Any number of threads may ask it."""

    def __init__(self, now: Callable[[], datetime], **knobs: Any) -> None:
        super().__init__(**knobs)
        self.now = now
        self.directory_url = f"{ORIGIN}/directory"
        self.issued: list[Issued] = []
        self.revoked: set[int] = set()
        self.requests: list[Seen] = []
        self._faults: list[_Fault] = []
        self._lock = RLock()
        self._count = 0
        self.restart()

    def restart(self) -> None:
        """Forget everything but the ledger and the log, and make a new root: what restarting Pebble does."""
        self.accounts: dict[str, FakeAccount] = {}
        self.orders: dict[str, FakeOrder] = {}
        self.authorizations: dict[str, FakeAuthorization] = {}
        self.nonces: set[str] = set()
        self.root, self.intermediate = make_hierarchy(self.now())

    @property
    def http(self) -> Http:
        """What a `Client` is handed in place of a `Transport`."""
        return self

    def count(self, method: str, path: str) -> int:
        """Return how many requests have come for this path, which may hold wildcards."""
        return sum(seen.method == method and fnmatchcase(seen.path, path) for seen in self.requests)

    def fail_next(
        self,
        method: str,
        path: str,
        *,
        problem: str | Mapping[str, Any] | None = None,
        status: int = 400,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        raises: Exception | None = None,
        after: bool = False,
        skip: int = 0,
        times: int = 1,
    ) -> None:
        """Make the next `times` requests for `path` (wildcards allowed) fail, after letting `skip` pass.

        The answer is a problem document (an error code, or the whole of it), `body`, or the exception
        `raises`. With `after` the CA does what it was asked before its answer is lost.
        """
        document = {"type": URN + problem, "detail": "scripted"} if isinstance(problem, str) else problem
        kind = "application/problem+json" if body is None else "text/html"

        def answer(url: str) -> Response:
            if raises is not None:
                if isinstance(raises, CaError):
                    raises.told = False  # each request has an error of its own
                raise raises
            content = json.dumps(document or {}).encode() if body is None else body
            common = {"content-type": kind, "replay-nonce": self._nonce()}
            return Response(url, status, {**common, **(headers or {})}, content)

        self._faults.append(_Fault(method, path, answer, after, skip, times))

    # -- Http ------------------------------------------------------------------------------------------

    def request(
        self,
        method: str,
        url: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        max_bytes: int = ANSWER_LIMIT,
        repeatable: bool = False,
    ) -> Response:
        """Answer one request; see `ca.transport.Http`."""
        with self._lock:
            path = urlsplit(url).path
            fault = self._find_fault(method, path)
            if fault and not fault.after:
                self.requests.append(Seen(method, path))
                return fault.answer(url)
            response = self._serve(method, url, path, body, headers or {})
            if fault:
                return fault.answer(url)
            if len(response.body) > max_bytes:
                raise AnswerFault(url, "it is larger than allowed")
            return response

    def _find_fault(self, method: str, path: str) -> _Fault | None:
        for fault in self._faults:
            if fault.method == method and fnmatchcase(path, fault.path) and fault.times:
                if fault.skip:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                return fault
        return None

    def _serve(self, method: str, url: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> Response:
        common = {"date": f"{self.now().astimezone(UTC):%a, %d %b %Y %H:%M:%S} GMT", "replay-nonce": self._nonce()}
        try:
            status, more, content = self._route(method, url, path, body, headers)
        except _Refused as refused:
            status, more = refused.status, {"content-type": "application/problem+json"}
            content = json.dumps(refused.document)
        return Response(url, status, {"content-type": "application/json", **common, **more}, content.encode())

    def _route(
        self, method: str, url: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> tuple[int, dict[str, str], str]:
        room = path.split("/")[1]
        if method != "POST":
            self.requests.append(Seen(method, path))
            match room:
                case "directory":
                    return 200, {}, json.dumps(self._directory())
                case "new-nonce":
                    return 200 if method == "HEAD" else 204, {}, ""
                case "renewal-info":
                    return self._renewal_info(path.removeprefix("/renewal-info/"))
            raise _Refused(405, "malformed", "method not allowed")
        if headers.get("Content-Type") != "application/jose+json" or body is None:
            raise _Refused(415, "malformed", "content type must be application/jose+json")
        signed = fake_jws.parse(body)
        payload = json.loads(signed.payload) if signed.payload else ""
        self.requests.append(Seen(method, path, payload, signed.header.get("kid")))
        if room == "new-account":
            return self._new_account(self._verify(signed, url, signed.header.get("jwk")), payload)
        account = self._authenticate(signed, url)
        routes: dict[str, Callable[[FakeAccount, str, Any], tuple[int, dict[str, str], str]]] = {
            "account": self._account,
            "key-change": self._key_change,
            "new-order": self._new_order,
            "order": self._order,
            "authorization": self._authorization,
            "challenge": self._challenge,
            "finalize": self._finalize,
            "certificate": self._certificate,
            "revoke": self._revoke,
        }
        if room not in routes:
            raise _Refused(404, "malformed", "no such resource")
        return routes[room](account, url, payload)

    # -- requests and accounts -------------------------------------------------------------------------

    def _nonce(self) -> str:
        nonce = self._name("nonce")
        self.nonces.add(nonce)
        return nonce

    def _name(self, kind: str) -> str:
        self._count += 1
        return base64url(sha256(f"{kind} {self._count}".encode()).digest())

    def _verify(self, signed: fake_jws.Jws, url: str, jwk: Mapping[str, str] | None) -> Mapping[str, str]:
        if ("jwk" in signed.header) == ("kid" in signed.header) or jwk is None:
            raise _Refused(400, "malformed", "exactly one of jwk and kid must be there")
        if signed.header.get("url") != url:
            raise _Refused(401, "unauthorized", "the signed url is another one")
        if not fake_jws.is_signed(signed, jwk):
            raise _Refused(400, "malformed", "the signature does not verify")
        if signed.header.get("nonce") not in self.nonces:
            raise _Refused(400, "badNonce", "the nonce was used or never given out")
        self.nonces.remove(signed.header["nonce"])
        return jwk

    def _authenticate(self, signed: fake_jws.Jws, url: str) -> FakeAccount:
        account = self.accounts.get(signed.header.get("kid", ""))
        if account is None:
            raise _Refused(400, "accountDoesNotExist", "unable to find account")
        self._verify(signed, url, account.jwk)
        if account.status != "valid":
            raise _Refused(403, "unauthorized", "account has been deactivated")
        return account

    def _new_account(self, jwk: Mapping[str, str], payload: Any) -> tuple[int, dict[str, str], str]:
        existing = next((a for a in self.accounts.values() if a.jwk == jwk), None)
        if existing is not None:
            if existing.status != "valid":
                raise _Refused(403, "unauthorized", "account has been deactivated")
            return 200, {"location": existing.url}, existing.show()
        if payload.get("onlyReturnExisting"):
            raise _Refused(400, "accountDoesNotExist", "no account for this key")
        if self.terms and not payload.get("termsOfServiceAgreed"):
            raise _Refused(403, "userActionRequired", "the terms must be agreed to")
        if self.eab_keys:
            self._check_binding(payload.get("externalAccountBinding"), jwk)
        account = FakeAccount(f"{ORIGIN}/account/{len(self.accounts) + 1}", jwk, payload.get("contact", []))
        self.accounts[account.url] = account
        return 201, {"location": account.url}, account.show()

    def _check_binding(self, binding: Any, jwk: Mapping[str, str]) -> None:
        if binding is None:
            raise _Refused(403, "externalAccountRequired", "a binding is compulsory")
        signed = fake_jws.parse(binding)
        key = self.eab_keys.get(signed.header.get("kid", ""))
        bound = json.loads(signed.payload) == jwk and signed.header.get("url") == f"{ORIGIN}/new-account"
        if key is None or not bound or not fake_jws.is_maced(signed, key):
            raise _Refused(403, "unauthorized", "the binding does not verify")

    def _account(self, account: FakeAccount, url: str, payload: Any) -> tuple[int, dict[str, str], str]:
        if url != account.url:
            raise _Refused(403, "unauthorized", "not your account")
        if payload:
            account.contact = payload.get("contact", account.contact)
            account.status = payload.get("status", account.status)
        return 200, {}, account.show()

    def _key_change(self, account: FakeAccount, url: str, payload: Any) -> tuple[int, dict[str, str], str]:
        inner = fake_jws.parse(payload)
        jwk = inner.header.get("jwk", {})
        meant = {"account": account.url, "oldKey": account.jwk}
        if set(inner.header) != {"alg", "jwk", "url"} or inner.header["url"] != url:
            raise _Refused(400, "malformed", "the inner header is wrong")
        if json.loads(inner.payload) != meant or not fake_jws.is_signed(inner, jwk):
            raise _Refused(400, "malformed", "the new key does not endorse the change")
        known = next((a for a in self.accounts.values() if a.jwk == jwk), None)
        if known is not None:
            raise _Refused(409, "conflict", "the key has an account already")
        account.jwk = jwk
        return 200, {}, account.show()

    # -- orders ----------------------------------------------------------------------------------------

    def _new_order(self, account: FakeAccount, url: str, payload: Any) -> tuple[int, dict[str, str], str]:
        names = [identifier["value"] for identifier in payload["identifiers"]]
        refused = [n for n in names if n in self.refused_names]
        if refused:
            parts = [_Refused(400, "rejectedIdentifier", "policy forbids it").document for _ in refused]
            named = [{**p, "identifier": {"type": "dns", "value": n}} for p, n in zip(parts, refused, strict=True)]
            raise _Refused(400, "rejectedIdentifier", "some names are refused", subproblems=named)
        profile, replaces = payload.get("profile"), payload.get("replaces")
        if profile is not None and profile not in self.profiles:
            raise _Refused(400, "invalidProfile", "no such profile")
        if replaces is not None and self.informs:
            self._check_replaces(account, names, replaces)
        expires_at = self.now() + timedelta(days=7)
        authorizations = [self._authorize(account, name, expires_at) for name in names]
        order = FakeOrder(
            f"{ORIGIN}/order/{self._name('order')[:12]}", account, names, authorizations, expires_at, profile, replaces
        )
        self.orders[order.url] = order
        order.advance()
        return 201, {"location": order.url}, order.show()

    def _check_replaces(self, account: FakeAccount, names: list[str], replaces: str) -> None:
        """Refuse what RFC 9773 §5 has a CA refuse, with what Pebble says."""
        line = self._find_issued(replaces)
        if line is None:
            raise _Refused(400, "malformed", "no such certificate, or of another issuer")
        if self.orders[line.order_url].account is not account:
            raise _Refused(403, "unauthorized", "another account ordered that certificate")
        if not line.dns_names & set(names):
            raise _Refused(500, "serverInternal", "the orders have no identifier in common")
        over = ("invalid",) if self.replaced_by == "order" else ("pending", "ready", "invalid")
        if any(order.replaces == replaces and order.status not in over for order in self.orders.values()):
            raise _Refused(409, "alreadyReplaced", "the certificate was replaced already")

    def _authorize(self, account: FakeAccount, name: str, expires_at: datetime) -> FakeAuthorization:
        if self.reuse_authorizations:
            for known in self.authorizations.values():
                if known.account is account and known.dns_name == name and known.status == "valid":
                    return known
        url = f"{ORIGIN}/authorization/{self._name('authorization')[:12]}"
        self.authorizations[url] = FakeAuthorization(url, account, name, self._name("token"), expires_at)
        return self.authorizations[url]

    def _order(self, account: FakeAccount, url: str, payload: Any) -> tuple[int, dict[str, str], str]:
        order = self._find(self.orders, url, account)
        for authorization in order.authorizations:
            authorization.look(self.validate)
        order.advance()
        return 200, self._wait(order.status in ("pending", "processing")), order.show()

    def _authorization(self, account: FakeAccount, url: str, payload: Any) -> tuple[int, dict[str, str], str]:
        authorization = self._find(self.authorizations, url, account)
        authorization.look(self.validate)
        return 200, self._wait(authorization.status == "pending"), authorization.show()

    def _challenge(self, account: FakeAccount, url: str, payload: Any) -> tuple[int, dict[str, str], str]:
        authorization = self._find(self.authorizations, url.replace("/challenge/", "/authorization/"), account)
        if payload != {}:
            raise _Refused(400, "malformed", "the answer to a challenge is {}")
        if authorization.challenge_status != "pending" or authorization.status != "pending":
            raise _Refused(400, "malformed", "the challenge is not pending")
        authorization.challenge_status = "processing"
        if self.validate_on == "answer":
            authorization.look(self.validate)
        return 200, {}, json.dumps(authorization.challenge())

    def _finalize(self, account: FakeAccount, url: str, payload: Any) -> tuple[int, dict[str, str], str]:
        order = self._find(self.orders, url.replace("/finalize/", "/order/"), account)
        order.advance()
        if order.status != "ready":
            raise _Refused(403, "orderNotReady", f"the order is {order.status}")
        csr = x509.load_der_x509_csr(fake_jws.decode(payload["csr"]))
        names = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        if not csr.is_signature_valid or set(names.get_values_for_type(x509.DNSName)) != set(order.dns_names):
            raise _Refused(400, "badCSR", "the request is for other names, or its signature is wrong")
        self._issue(order, csr)
        order.status, order.looks_left = "processing", self.processing_looks
        order.advance()
        return 200, self._wait(order.status == "processing"), order.show()

    def _issue(self, order: FakeOrder, csr: x509.CertificateSigningRequest) -> None:
        lifetime = self.profiles.get(order.profile or "", self.lifetime)
        leaf = issue(self.intermediate, csr, self.now(), lifetime)
        order.chain_pem = to_pem(leaf, self.intermediate.certificate)
        names = frozenset(order.dns_names)
        self.issued.append(
            Issued(leaf.serial_number, order.url, names, leaf, order.chain_pem, order.profile, order.replaces)
        )

    def _certificate(self, account: FakeAccount, url: str, payload: Any) -> tuple[int, dict[str, str], str]:
        order = self._find(self.orders, url.replace("/certificate/", "/order/"), account)
        if order.status != "valid":
            raise _Refused(404, "malformed", "no such certificate")
        return 200, {"content-type": "application/pem-certificate-chain"}, order.chain_pem

    def _revoke(self, account: FakeAccount, url: str, payload: Any) -> tuple[int, dict[str, str], str]:
        serial = x509.load_der_x509_certificate(fake_jws.decode(payload["certificate"])).serial_number
        if all(line.serial != serial for line in self.issued):
            raise _Refused(404, "malformed", "no such certificate")
        if serial in self.revoked:
            raise _Refused(400, "alreadyRevoked", "it was revoked already")
        self.revoked.add(serial)
        return 200, {}, ""

    def _renewal_info(self, name: str) -> tuple[int, dict[str, str], str]:
        start, end = self.renewal_windows.get(name) or self._usual_window(name)
        shown: dict[str, Any] = {"suggestedWindow": {"start": show_time(start), "end": show_time(end)}}
        if self.explanation_url is not None:
            shown["explanationURL"] = self.explanation_url
        wait = {"retry-after": self.renewal_retry_after} if self.renewal_retry_after is not None else {}
        return 200, wait, json.dumps(shown)

    def _usual_window(self, name: str) -> tuple[datetime, datetime]:
        line = self._find_issued(name)
        if line is None:
            raise _Refused(404, "malformed", "no such certificate")
        ends_at = line.certificate.not_valid_after_utc
        return ends_at - (ends_at - line.certificate.not_valid_before_utc) / 3, ends_at

    def _find_issued(self, renewal_id: str) -> Issued | None:
        """Return a line of the ledger whose order is remembered: a restart forgets them."""
        return next((i for i in self.issued if i.renewal_id == renewal_id and i.order_url in self.orders), None)

    # -- what is shown ---------------------------------------------------------------------------------

    def _find(self, things: Mapping[str, Any], url: str, account: FakeAccount) -> Any:
        thing = things.get(url)
        if thing is None or thing.account is not account:
            raise _Refused(404, "malformed", "no such resource")
        return thing

    def _wait(self, waiting: bool) -> dict[str, str]:
        return {"retry-after": self.retry_after} if waiting and self.retry_after else {}

    def _directory(self) -> dict[str, Any]:
        meta: dict[str, Any] = {"profiles": {name: str(life) for name, life in self.profiles.items()}}
        if self.terms:
            meta["termsOfService"] = self.terms
        if self.eab_keys:
            meta["externalAccountRequired"] = True
        paths = {
            "newNonce": "new-nonce",
            "newAccount": "new-account",
            "newOrder": "new-order",
            "revokeCert": "revoke",
            "keyChange": "key-change",
        }
        if self.informs:
            paths["renewalInfo"] = "renewal-info"
        return {"meta": meta, **{name: f"{ORIGIN}/{path}" for name, path in paths.items()}}
