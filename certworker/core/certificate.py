"""Certificates as facts: what a chain says, and whether it is what was asked for.

Everything that a CA or a person sends is hostile until `check_chain` or `read_leaf` has read it.
"""

import hashlib
import re
from base64 import urlsafe_b64encode
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from certworker.errors import ChainRefused, ChainUnreadable, InputError

MAX_CHAIN_BYTES = 256 * 1024
MAX_CHAIN_LENGTH = 20
CLOCK_TOLERANCE = timedelta(minutes=5)
"""A leaf that starts this little in the future is a matter of two clocks, not of an early leaf."""

_LONGEST_RENEWAL_ID = 255
"""Characters; it becomes part of a URL and of an index, and a CA's own are half as long."""

_REMEMBERED = 32
"""Certificates, and signatures: a chain is checked when it comes and when it is put to use, and ends like many."""

_KIND = re.compile(r"-----BEGIN ([^-\n]*)-----")
_BEGIN, _END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"


@dataclass(frozen=True, slots=True)
class Validity:
    """When a certificate is valid."""

    not_before: datetime
    not_after: datetime

    @property
    def lifetime(self) -> timedelta:
        return self.not_after - self.not_before

    def usable_from(self, moment: datetime) -> "Validity":
        """Return what is left of it when it arrives at `moment`: a backdated certificate has a shorter life."""
        return Validity(max(self.not_before, moment), self.not_after)


def takes_over_at(new: Validity, present: Validity | None, now: datetime) -> datetime:
    """Return when `new` serves in the place of `present`: now, unless it starts later and `present` lasts until then.

    Where nothing else serves it does so at once: to clients it is no worse than what has ended, and it is
    as good as it can be if only our clock is wrong.
    """
    if present is None or new.not_before <= now + CLOCK_TOLERANCE:
        return now
    return max(min(new.not_before + CLOCK_TOLERANCE, present.not_after), now)


_SHORT_LIFE = timedelta(hours=1)
_USUAL_DRIFT = 0.25
"""Lives count from when they came, so that two equal ones may differ; this far they do not."""


def is_odd_life(new: Validity, last: Validity | None) -> bool:
    """Say whether an operator should hear of a life: it is another one than the last, or the first and very short."""
    if last is None:
        return new.lifetime < _SHORT_LIFE
    return abs(new.lifetime - last.lifetime) > last.lifetime * _USUAL_DRIFT


@dataclass(frozen=True, slots=True)
class Leaf:
    """What one certificate says of itself."""

    dns_names: tuple[str, ...]
    """Lower case, sorted."""
    dns_names_only: bool
    """Whether it names nothing else: no address, no mailbox."""
    validity: Validity
    fingerprint: str
    """SHA-256 of the DER, 64 lower-case hex digits."""
    serial: str
    """Lower-case hex, no leading zeros."""
    issuer: str
    """Common name of the issuer, or its whole name."""
    spki_sha256: str
    """SHA-256 of the public key (SubjectPublicKeyInfo DER), 64 lower-case hex digits."""
    renewal_id: str | None = None
    """What its CA calls it in renewal information and `replaces` (RFC 9773 §4.1); None without a key identifier."""


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain that passed every check, written anew: leaf first, each followed by its issuer, without blanks."""

    pem: str
    leaf: Leaf


def check_chain(
    chain_pem: str, *, spki_sha256: str, dns_names: Iterable[str], now: datetime, private_ca: bool = False
) -> Chain:
    """Return the CA's chain if it is the certificate that was ordered; ChainRefused says why not.

    Only CERTIFICATE blocks (RFC 8555 §11.4: anything else, a private key above all, refuses the whole
    file), a leaf whose key is ours, whose names are exactly those asked for, which is no CA and has not
    ended. The others may come in any order, but each must be an issuer on the way up from the leaf. A leaf
    alone is enough only of a `private_ca`. When it starts is for `takes_over_at` to judge.
    """
    certificates = _read_blocks(chain_pem)
    ours = next((one for one in certificates if _find_key(one) == spki_sha256), None)
    if ours is None:
        raise ChainRefused("the CA's certificate is for another key than the one in our CSR")
    leaf = _describe(ours)
    if set(leaf.dns_names) != set(dns_names):
        raise ChainRefused(f"the CA's certificate is for {', '.join(leaf.dns_names)}, not for what was ordered")
    if not leaf.dns_names_only:
        raise ChainRefused("the CA's certificate is for more than the DNS names that were ordered")
    _check_leaf(ours, leaf, now)
    chain = _put_in_order(ours, certificates)
    # Who trusts a private root has it, and it may have signed the leaf itself. A public root never does that
    # (Baseline Requirements §6.1.7), and a client does not go looking for the intermediate that is missing.
    if len(chain) == 1 and not private_ca:
        raise ChainRefused(f"the chain ends with the leaf: the certificate of its issuer, {leaf.issuer}, is missing")
    return Chain(_to_pem(chain), leaf)


def read_leaf(chain_pem: str) -> Leaf:
    """Return what the first certificate of a PEM text says; ChainRefused when it cannot be read."""
    return _describe(_read_blocks(chain_pem)[0])


def normalise_pair(chain_pem: str, key_pem: str) -> tuple[str, str]:
    """Return chain and key written anew; InputError when they cannot be read or do not belong together."""
    try:
        certificates = _read_blocks(chain_pem)
        spki_sha256 = _describe(certificates[0]).spki_sha256
        key = load_pem_private_key(key_pem.encode(), None)
    except (ChainRefused, ValueError, TypeError, UnsupportedAlgorithm) as error:
        what = str(error) if isinstance(error, ChainRefused) else "the private key cannot be read as unencrypted PEM"
        raise InputError(what) from None
    if _spki_sha256(key.public_key()) != spki_sha256:
        raise InputError("the private key does not belong to the certificate")
    return _to_pem(certificates), key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def check_order(chain_pem: str) -> None:
    """Raise `ChainRefused` unless each certificate is the issuer of the one before it (RFC 8446 §4.4.2)."""
    certificates = _read_blocks(chain_pem)
    if _put_in_order(certificates[0], certificates) != certificates:
        raise ChainRefused("the chain is out of order: the leaf comes first, then whoever issued the one before")


def _read_blocks(chain_pem: str) -> list[x509.Certificate]:
    if len(chain_pem) > MAX_CHAIN_BYTES:
        raise ChainRefused(f"the chain has {len(chain_pem)} characters, at most {MAX_CHAIN_BYTES} are read")
    kinds = _KIND.findall(chain_pem)
    if any(kind != "CERTIFICATE" for kind in kinds):
        raise ChainRefused("the chain holds something else than certificates, so none of it is used")
    if len(kinds) > MAX_CHAIN_LENGTH:
        raise ChainRefused(f"the chain holds {len(kinds)} certificates, at most {MAX_CHAIN_LENGTH} are read")
    if not kinds:
        raise ChainUnreadable("the chain holds no certificates")
    *blocks, behind = chain_pem.split(_END)
    parts = [block.partition(_BEGIN) for block in blocks]
    if behind.strip() or any(before.strip() or not begin for before, begin, _ in parts):
        raise ChainUnreadable("the chain holds text outside its certificates")
    try:
        return [_read_block(base64) for _, _, base64 in parts]
    except (ValueError, x509.InvalidVersion):
        raise ChainUnreadable("a certificate of the chain cannot be read") from None


@lru_cache(_REMEMBERED)
def _read_block(base64: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate(f"{_BEGIN}{base64}{_END}".encode())


def _describe(certificate: x509.Certificate) -> Leaf:
    if certificate.serial_number <= 0:
        raise ChainRefused("the certificate's serial number is not positive (RFC 5280 §4.1.2.2)")
    spki_sha256 = _find_key(certificate)
    if spki_sha256 is None:
        raise ChainRefused("the certificate cannot be read")
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        names = extension.value.get_values_for_type(x509.DNSName)
        common = certificate.issuer.get_attributes_for_oid(NameOID.COMMON_NAME)
        return Leaf(
            dns_names=tuple(sorted({name.lower() for name in names})),
            dns_names_only=len(names) == len(extension.value),
            validity=Validity(certificate.not_valid_before_utc, certificate.not_valid_after_utc),
            fingerprint=hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest(),
            serial=f"{certificate.serial_number:x}",
            issuer=str(common[0].value) if common else certificate.issuer.rfc4514_string(),
            spki_sha256=spki_sha256,
            renewal_id=_renewal_id(certificate),
        )
    except x509.ExtensionNotFound:
        raise ChainRefused("the certificate names no DNS names (no subjectAltName)") from None
    except (ValueError, x509.DuplicateExtension):
        raise ChainRefused("the certificate cannot be read") from None


def _renewal_id(certificate: x509.Certificate) -> str | None:
    try:
        authority = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    except x509.ExtensionNotFound:
        return None
    if not authority.key_identifier:
        return None
    number = certificate.serial_number
    # As DER has it: signed, so a number whose first bit is set comes after a byte 00.
    serial = number.to_bytes(number.bit_length() // 8 + 1, "big")
    renewal_id = f"{_base64url(authority.key_identifier)}.{_base64url(serial)}"
    return renewal_id if len(renewal_id) <= _LONGEST_RENEWAL_ID else None


def _base64url(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()


def _put_in_order(leaf: x509.Certificate, certificates: list[x509.Certificate]) -> list[x509.Certificate]:
    """Return the leaf, its issuer, the issuer of that one and so on; all of them, or ChainRefused."""
    others = dict.fromkeys(one for one in certificates if one != leaf)
    # Of a root that is there twice, the one that signed itself: the other, which somebody else signed, may follow.
    chain, rest = [leaf], sorted(others, key=lambda one: one.issuer != one.subject)
    while issuer := next((one for one in rest if _has_issued(one, chain[-1])), None):
        chain.append(issuer)
        rest.remove(issuer)
    if rest:
        # Whether an intermediate is missing or a stranger was put in, cannot be told; clients may fail with either.
        raise ChainRefused("not every certificate of the chain has issued another one of it, up from the leaf")
    return chain


@lru_cache(_REMEMBERED)
def _has_issued(issuer: x509.Certificate, certificate: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _check_leaf(certificate: x509.Certificate, leaf: Leaf, now: datetime) -> None:
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except x509.ExtensionNotFound:
        constraints = x509.BasicConstraints(ca=False, path_length=None)
    if constraints.ca:
        raise ChainRefused("the CA sent a CA certificate where ours should be")
    if leaf.validity.not_after <= now:
        raise ChainRefused(f"the CA's certificate has expired already, at {leaf.validity.not_after.isoformat()}")


def _to_pem(certificates: Iterable[x509.Certificate]) -> str:
    return "".join(certificate.public_bytes(Encoding.PEM).decode() for certificate in certificates)


@lru_cache(_REMEMBERED)
def _find_key(certificate: x509.Certificate) -> str | None:
    try:
        return _spki_sha256(certificate.public_key())
    except (ValueError, UnsupportedAlgorithm):
        return None


def _spki_sha256(public_key: object) -> str:
    der = public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined]
    return hashlib.sha256(der).hexdigest()
