"""What may be a name, and that every refusal says which value and which rule."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from certworker.core.names import MAX_NAMES, check_name, check_names, names_hash, registered_domain
from certworker.errors import InputError, NameRefused

GRAMMAR = re.compile(r"(\*\.)?[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")
LONG_LABEL = "a" * 63
LONGEST = f"{LONG_LABEL}.{LONG_LABEL}.{LONG_LABEL}.{'a' * 57}.com"
assert len(LONGEST) == 253


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        ("", "is empty"),
        (".", "ends with a dot"),
        ("a..b", "empty label"),
        (".example.com", "empty label"),
        ("example.com.", "ends with a dot"),
        ("1.2.3.4.", "ends with a dot"),
        (f"a{LONG_LABEL}.com", "label of 64 characters, at most 63"),
        (f"a{LONGEST}", "has 254 characters, at most 253"),
        ("a.b.c.d.e.f.g.h.i.j.com", "has 11 labels, at most 10"),
        ("a_b.example.com", "underscore"),
        ("_acme-challenge.example.com", "underscore"),
        ("-a.example.com", "inner hyphens only"),
        ("a-.example.com", "inner hyphens only"),
        ("a b.example.com", "space or a control character"),
        (" example.com", "space or a control character"),
        ("example.com\n", "space or a control character"),
        ("example.com\r\nX: 1", "space or a control character"),
        ("a\tb.com", "space or a control character"),
        ("\0.com", "space or a control character"),
        ("\x7f.com", "space or a control character"),
        ("\x1b[31mred.com", "space or a control character"),
        ("%61.com", "letters, digits"),
        ("😀.com", "IDNA 2008"),
        ("../../etc/passwd", "empty label"),
        ("a/b", "letters, digits"),
        ("a\\b", "letters, digits"),
        ("a;b.com", "letters, digits"),
        ("{a}.com", "letters, digits"),
        ("$(x).com", "letters, digits"),
        ("`x`.com", "letters, digits"),
        ('a".com', "letters, digits"),
        ("http://example.com", "letters, digits"),
        ("example.com:443", "letters, digits"),
        ("ops@example.com", "letters, digits"),
    ],
)
def test_what_is_no_name_at_all(value: str, rule: str) -> None:
    """E01, E02, E10: refused for every CA, in one line with the value and the rule."""
    for private_ca in (False, True):
        with pytest.raises(NameRefused, match=re.escape(rule)) as refused:
            check_name(value, private_ca=private_ca, wildcard=True)
        assert refused.value.value == value
        assert repr(value) in str(refused.value)
        assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("EXAMPLE.com", "example.com"),
        (LONGEST, LONGEST),
        (f"{LONG_LABEL}.com", f"{LONG_LABEL}.com"),
        ("a.b.c.d.e.f.g.h.i.com", "a.b.c.d.e.f.g.h.i.com"),
        ("3com.com", "3com.com"),
        ("1.2.3.4.com", "1.2.3.4.com"),
        ("a--b.com", "a--b.com"),
        ("a.co.uk", "a.co.uk"),
    ],
)
def test_what_is_a_name(value: str, name: str) -> None:
    """E02: lower case; every limit itself is allowed."""
    assert check_name(value) == name


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("münchen.de", "xn--mnchen-3ya.de"),
        ("MÜNCHEN.de", "xn--mnchen-3ya.de"),
        ("mu\u0308nchen.de", "xn--mnchen-3ya.de"),
        ("xn--mnchen-3ya.de", "xn--mnchen-3ya.de"),
        ("XN--MNCHEN-3YA.de", "xn--mnchen-3ya.de"),
        ("faß.de", "xn--fa-hia.de"),
        ("xn--fa-hia.de", "xn--fa-hia.de"),
        ("fass.de", "fass.de"),
        ("example。com", "example.com"),
        ("ｅｘａｍｐｌｅ．com", "example.com"),
        ("пример.рф", "xn--e1afmkfd.xn--p1ai"),
        ("क्\u200dष.com", "xn--11b2ezcw70k.com"),
    ],
)
def test_both_forms_of_an_international_name_are_one(value: str, name: str) -> None:
    """E03: IDNA 2008 with UTS 46 mapping, non-transitional: `ß` stays itself."""
    assert check_name(value) == name


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        ("a\u200db.com", "Joiner U+200D not allowed"),
        ("\u202eevil.com", "IDNA 2008"),
        ("example.com。", "empty label"),
        ("xn--a.com", "no valid punycode"),
        ("xn--99999999.com", "no valid punycode"),
        ("xn--.com", "inner hyphens only"),
        ("xn--fass-.de", "inner hyphens only"),
        ("xn--ß.de", "IDNA 2008"),
        ("ab--c.com", "reserved '--'"),
        ("a\u0085b.com", "IDNA 2008"),
        ("ü" * 300 + ".com", "IDNA 2008"),
    ],
)
def test_what_is_no_international_name(value: str, rule: str) -> None:
    """E03: joiners out of place, bad punycode, reserved hyphens."""
    with pytest.raises(NameRefused, match=re.escape(rule)) as refused:
        check_name(value, private_ca=True)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("value", ["*.example.com", "*.MÜNCHEN.de"])
def test_a_wildcard_needs_more_than_http01(value: str) -> None:
    """E04: refused before any order; kept where it is allowed."""
    with pytest.raises(NameRefused, match="wildcard cannot be validated by HTTP-01"):
        check_name(value)

    assert check_name(value, wildcard=True).startswith("*.")


@pytest.mark.parametrize("value", ["*", "*.*.example.com", "a.*.example.com", "a*.example.com", "*a.example.com", "*."])
def test_odd_wildcards_are_refused_everywhere(value: str) -> None:
    """E04: one star, alone in the first label."""
    with pytest.raises(NameRefused, match=r"whole first label|is empty"):
        check_name(value, private_ca=True, wildcard=True)


@pytest.mark.parametrize("value", ["*.com", "*.co.uk"])
def test_a_wildcard_over_a_public_suffix_is_refused(value: str) -> None:
    """E09 holds for what is below the star."""
    with pytest.raises(NameRefused, match="public"):
        check_name(value, wildcard=True)


@pytest.mark.parametrize("value", ["1.2.3.4", "::1", "[::1]", "2001:db8::1", "fe80::1%eth0", "１.２.３.４"])
def test_an_address_is_no_name(value: str) -> None:
    """E08."""
    with pytest.raises(NameRefused, match="is an IP address, not a name"):
        check_name(value, private_ca=True)


@pytest.mark.parametrize("value", ["127.1", "0x7f.1", "0x7f000001", "a.0x", "a.0xff", "2130706433", "example.1"])
def test_what_a_browser_takes_for_an_address_is_no_name(value: str) -> None:
    """E08: a last label that is a number, hexadecimal too."""
    with pytest.raises(NameRefused, match="ends in a number"):
        check_name(value, private_ca=True)


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        ("localhost", "no public CA issues for .localhost"),
        ("app.localhost", "no public CA issues for .localhost"),
        ("printer.local", "no public CA issues for .local"),
        ("db.internal", "no public CA issues for .internal"),
        ("app.test", "no public CA issues for .test"),
        ("secret.onion", "no public CA issues for .onion"),
        ("intranet", "has one label only"),
        ("com", "has one label only"),
        ("co.uk", "is a public suffix"),
        ("github.io", "is a public suffix"),
    ],
)
def test_what_only_a_private_ca_issues_for(value: str, rule: str) -> None:
    """E09."""
    with pytest.raises(NameRefused, match=re.escape(rule)):
        check_name(value)

    assert check_name(value, private_ca=True) == value


def test_what_is_not_text_is_refused() -> None:
    """A row of another program may hold anything."""
    for value in (None, 5, ["a.com"], b"a.com"):
        with pytest.raises(NameRefused, match="is not text"):
            check_name(value)  # type: ignore[arg-type]


def test_a_message_stays_readable() -> None:
    """The value is named, but not all 100,000 characters of it."""
    with pytest.raises(NameRefused) as refused:
        check_name("a" * 100_000)

    assert len(str(refused.value)) < 500
    assert "100000 characters" in str(refused.value)


def test_names_keep_their_order_and_lose_repeats() -> None:
    """E02: repeats are found after normalising; the first name stays the first."""
    assert check_names(["b.com", "A.com", "B.COM", "a.com"]) == ("b.com", "a.com")


def test_no_names_are_no_policy() -> None:
    """An empty list is refused."""
    with pytest.raises(InputError, match="names: at least one is needed"):
        check_names([])


def test_a_shared_certificate_has_a_limit() -> None:
    """E06: more than 100 in one certificate are refused, in one policy they are not."""
    names = [f"n{number}.example.com" for number in range(MAX_NAMES + 1)]

    assert len(check_names(names)) == MAX_NAMES + 1
    assert len(check_names([*names[1:], names[1].upper()], shared=True)) == MAX_NAMES
    with pytest.raises(InputError, match="101 in one shared certificate, at most 100"):
        check_names(names, shared=True)


def test_a_covered_name_is_refused_beside_its_wildcard() -> None:
    """E05: CAs refuse the overlap; in certificates of their own there is none."""
    names = ["*.example.com", "www.example.com", "example.com", "a.b.example.com"]
    with pytest.raises(NameRefused, match=r"'www.example.com': is covered by \*.example.com"):
        check_names(names, wildcard=True, shared=True)

    assert check_names(names, wildcard=True) == tuple(names)
    assert len(check_names([names[0], *names[2:]], wildcard=True, shared=True)) == 3


def test_one_bad_name_refuses_all() -> None:
    """The first bad one is named."""
    with pytest.raises(NameRefused, match=r"'a_b\.com'"):
        check_names(["good.com", "a_b.com", "c..d"])


def test_a_long_first_name_is_allowed() -> None:
    """E07: more than the 64 characters of a common name."""
    assert check_names([LONGEST], shared=True) == (LONGEST,)


letters = st.sampled_from("abzABZ019-_.*%:[] \n\0ßüИ。\u200d漢İſK")
labels = st.text("abcxyzABC019üßИ漢-", min_size=1, max_size=12)
likely = st.lists(labels, min_size=1, max_size=5).map(lambda parts: ".".join([*parts, "com"]))
values = st.one_of(likely, likely.map("*.".__add__), st.text(max_size=80), st.text(letters, max_size=40),
                   st.text("ab.-", max_size=300))  # fmt: skip


def refusal_of(value: str, **allowed: bool) -> NameRefused | None:
    try:
        check_name(value, **allowed)
    except NameRefused as refused:
        return refused
    return None


@given(value=values, private_ca=st.booleans(), wildcard=st.booleans())
@example(value="*." + LONGEST, private_ca=True, wildcard=True)
@example(value="*." + LONGEST[2:], private_ca=True, wildcard=True)
def test_a_name_that_is_accepted_has_one_form(value: str, private_ca: bool, wildcard: bool) -> None:
    """Lower-case A-labels of at most 253 characters, and checking again changes nothing; else a clean refusal."""
    refused = refusal_of(value, private_ca=private_ca, wildcard=wildcard)
    if refused is not None:
        assert str(refused).isprintable()
        assert refused.value == value
        return
    name = check_name(value, private_ca=private_ca, wildcard=wildcard)

    assert GRAMMAR.fullmatch(name)
    assert len(name) <= 253
    assert wildcard or "*" not in name
    assert check_name(name, private_ca=private_ca, wildcard=wildcard) == name
    assert check_name(value.swapcase() if value.isascii() else value, private_ca=private_ca, wildcard=wildcard) == name


@given(value=likely)
def test_a_private_ca_only_allows_more(value: str) -> None:
    """What a public CA takes, a private one takes as the same name."""
    if refusal_of(value) is None:
        assert check_name(value, private_ca=True) == check_name(value)


@given(st.lists(st.sampled_from(["a.com", "b.com", "c.com", "d.com"]), min_size=1))
def test_a_hash_knows_the_set_only(names: list[str]) -> None:
    """Order and repeats do not matter, members do."""
    assert names_hash(names) == names_hash(reversed(names)) == names_hash({*names})
    assert names_hash(names) != names_hash([*names, "e.com"])
    assert names_hash(["ab.com"]) != names_hash(["a", "b.com"])


@pytest.mark.parametrize(
    ("dns_name", "registered"),
    [
        ("example.com", "example.com"),
        ("a.b.example.com", "example.com"),
        ("*.example.com", "example.com"),
        ("www.example.co.uk", "example.co.uk"),
        ("alice.github.io", "alice.github.io"),
        ("www.xn--fiqs8s", "www.xn--fiqs8s"),
        ("a.b.xn--fiqs8s", "b.xn--fiqs8s"),
        ("co.uk", "co.uk"),
        ("a.b.test", "b.test"),
        ("localhost", "localhost"),
    ],
)
def test_a_registered_domain_is_what_an_owner_has(dns_name: str, registered: str) -> None:
    """By the public suffix list with its private part, as Let's Encrypt counts; a suffix stands for itself."""
    assert registered_domain(dns_name) == registered
