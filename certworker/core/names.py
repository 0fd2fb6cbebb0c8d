"""DNS names: normalised, then validated, then compared. Everything past this door is an A-label.

CAs differ in what they accept, and a test CA accepts nearly anything, so the rules are ours: RFC 1035
sizes, IDNA 2008 (with UTS 46 mapping, non-transitional), and what public CAs refuse.
"""

import hashlib
import ipaddress
import re
from collections.abc import Iterable
from functools import cache

import idna
from publicsuffixlist import PublicSuffixList

from certworker.errors import InputError, NameRefused

MAX_NAMES = 100
"""Names in one certificate; Let's Encrypt's `classic` profile has this limit."""

_MAX_LENGTH = 253
_MAX_LABELS = 10
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
"""A last label like this makes the name an IPv4 address to browsers (WHATWG URL, "ends in a number")."""
_ODD = re.compile(r"[^\x21-\x7e]")
_PRIVATE_SUFFIXES = frozenset(
    ["localhost", "local", "internal", "test", "example", "invalid", "onion", "alt", "lan", "home", "corp", "arpa"]
)
"""Names that no public CA may issue for (RFC 2606, RFC 6761, RFC 6762, RFC 7686, RFC 9476, ICANN)."""


def check_name(value: str, *, private_ca: bool = False, wildcard: bool = False) -> str:
    """Return `value` as a lower-case A-label name; raise NameRefused with the rule it breaks.

    `wildcard` allows `*.name`, which HTTP-01 cannot prove. A private CA may issue for names that no
    public one may, such as `app.test` or `localhost`.
    """
    if not isinstance(value, str):
        raise NameRefused(str(value)[:100], "is not text")
    prefix = "*." if value.startswith("*.") else ""
    if prefix and not wildcard:
        raise NameRefused(value, "a wildcard cannot be validated by HTTP-01")
    name = _to_ascii(value, value.removeprefix(prefix))
    _check_length(value, prefix + name)
    _check_shape(value, name)
    if not private_ca:
        _check_public(value, name)
    return prefix + name


def check_names(
    values: Iterable[str], *, private_ca: bool = False, wildcard: bool = False, shared: bool = False
) -> tuple[str, ...]:
    """Return the names of one policy, checked, without repeats, in the given order.

    Raises NameRefused for the first bad one, InputError when there are none, or (for one shared
    certificate) too many, or one that a wildcard among them covers.
    """
    names = tuple(dict.fromkeys(check_name(v, private_ca=private_ca, wildcard=wildcard) for v in values))
    if not names:
        raise InputError("names: at least one is needed")
    if shared and len(names) > MAX_NAMES:
        raise InputError(f"names: {len(names)} in one shared certificate, at most {MAX_NAMES} are allowed")
    for name in names:
        wider = "*." + name.partition(".")[2]
        if shared and wider in names and name != wider:
            raise NameRefused(name, f"is covered by {wider} in the same certificate")
    return names


def names_hash(names: Iterable[str]) -> str:
    """Return what identifies a set of names: SHA-256 of the sorted A-labels, 64 hex digits."""
    return hashlib.sha256("\n".join(sorted(set(names))).encode()).hexdigest()


def registered_domain(dns_name: str) -> str:
    """Return what an owner registered: the public suffix of `dns_name` and one label more.

    A name that is itself a public suffix, or a private CA's with one label, stands for itself.
    """
    name = dns_name.removeprefix("*.")
    return _public_suffixes().privatesuffix(name, accept_unknown=True) or name


def _to_ascii(value: str, base: str) -> str:
    if not base:
        raise NameRefused(value, "is empty")
    if base.endswith("."):
        raise NameRefused(value, "ends with a dot: write it without")
    if base.isascii():
        if _ODD.search(base):
            raise NameRefused(value, "has a space or a control character")
        return base.lower()
    try:
        return idna.encode(base, uts46=True, std3_rules=True, transitional=False).decode()
    except (idna.IDNAError, UnicodeError) as error:
        raise NameRefused(value, f"is no internationalised name (IDNA 2008): {_one_line(error)}") from None


def _check_length(value: str, name: str) -> None:
    if len(name) > _MAX_LENGTH:
        raise NameRefused(value, f"has {len(name)} characters, at most {_MAX_LENGTH} are allowed")


def _check_shape(value: str, name: str) -> None:
    if "*" in name:
        raise NameRefused(value, "a wildcard may only be the whole first label")
    if _is_address(name):
        raise NameRefused(value, "is an IP address, not a name")
    labels = name.split(".")
    if len(labels) > _MAX_LABELS:
        raise NameRefused(value, f"has {len(labels)} labels, at most {_MAX_LABELS} are allowed")
    for label in labels:
        _check_label(value, label)
    if _NUMBER.fullmatch(labels[-1]):
        raise NameRefused(value, "ends in a number, like an IP address")


def _check_label(value: str, label: str) -> None:
    if not label:
        raise NameRefused(value, "has an empty label (two dots in a row, or a leading one)")
    if len(label) > 63:
        raise NameRefused(value, f"has a label of {len(label)} characters, at most 63 are allowed")
    if "_" in label:
        raise NameRefused(value, "has an underscore, which no host name may have")
    if not _LABEL.fullmatch(label):
        raise NameRefused(value, f"label {label!r} may hold letters, digits and inner hyphens only")
    if label[2:4] == "--":
        _check_a_label(value, label)


def _check_a_label(value: str, label: str) -> None:
    if not label.startswith("xn--"):
        raise NameRefused(value, f"label {label!r} has a reserved '--' in third place")
    try:
        round_trip = idna.alabel(idna.ulabel(label)).decode()
    except (idna.IDNAError, UnicodeError) as error:
        raise NameRefused(value, f"label {label!r} is no valid punycode: {_one_line(error)}") from None
    if round_trip != label:
        raise NameRefused(value, f"label {label!r} is written {round_trip!r} in IDNA 2008")


def _check_public(value: str, name: str) -> None:
    labels = name.split(".")
    if labels[-1] in _PRIVATE_SUFFIXES:
        raise NameRefused(value, f"no public CA issues for .{labels[-1]}; set ACME_PRIVATE_CA for a private one")
    if len(labels) == 1:
        raise NameRefused(value, "has one label only; no public CA issues for it")
    if _public_suffixes().publicsuffix(name, accept_unknown=True) == name:
        raise NameRefused(value, "is a public suffix, not a name of one owner")


@cache
def _public_suffixes() -> PublicSuffixList:
    return PublicSuffixList()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]").partition("%")[0])
    except ValueError:
        return False
    return True


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
