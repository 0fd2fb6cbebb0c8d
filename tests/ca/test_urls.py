"""Which URLs are asked, and how they are taken apart."""

from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from certworker.ca.urls import Origin, is_url, read_url


@pytest.mark.parametrize(
    ("text", "origin", "authority", "target"),
    [
        ("https://ca.test", Origin("https", "ca.test", 443), "ca.test", "/"),
        ("HTTPS://CA.test:443/Dir", Origin("https", "ca.test", 443), "ca.test", "/Dir"),
        ("https://ca.test:14000/a/b?c=d?#e", Origin("https", "ca.test", 14000), "ca.test:14000", "/a/b?c=d?"),
        ("https://ca.test?a", Origin("https", "ca.test", 443), "ca.test", "/?a"),
        ("https://ca.test:/", Origin("https", "ca.test", 443), "ca.test", "/"),
        ("http://127.0.0.1:443/", Origin("http", "127.0.0.1", 443), "127.0.0.1:443", "/"),
        ("https://[::1]:14000/x", Origin("https", "::1", 14000), "[::1]:14000", "/x"),
        ("https://[::1]/x", Origin("https", "::1", 443), "[::1]", "/x"),
    ],
)
def test_a_url_is_taken_apart(text: str, origin: Origin, authority: str, target: str) -> None:
    """Into where a request goes and what it asks there."""
    url = read_url(text)

    assert url is not None
    assert (url.origin, url.origin.authority, url.target) == (origin, authority, target)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/dir",
        "//ca.test/",
        "ca.test/dir",
        "ftp://ca.test/",
        "https://",
        "https:///dir",
        "https:ca.test",
        "https://user@ca.test/",
        "https://u:p@ca.test/",
        "https://ca.test\\@evil.test/",
        "https://ca.test:0/",
        "https://ca.test:65536/",
        "https://ca.test:0x1/",
        "https://ca.test:1:2/",
        "https://[::1/",
        "https://::1/",
        "https://ca.test/\n",
        "https://ca.test/ x",
        "https://ca.test/\x7f",
        "https://cä.test/",
        "https://ca.test/" + "x" * 2048,
    ],
)
def test_nothing_else_is_a_url(text: str) -> None:
    """Least of all what two readers could read in two ways."""
    assert read_url(text) is None


def test_a_url_is_of_a_scheme() -> None:
    assert is_url("https://ca.test/", "https")
    assert not is_url("http://ca.test/", "https")


URLS = st.builds(
    "{}://{}{}{}".format,
    st.sampled_from(["https", "http"]),
    st.text("aA0.-", min_size=1, max_size=20),
    st.sampled_from(["", ":1", ":8443"]),
    st.text("/?#:@aA%.\"\\", max_size=30).map(lambda rest: rest if rest[:1] in ("", "/", "?", "#") else f"/{rest}"),
)  # fmt: skip


@given(URLS)
def test_it_is_taken_apart_as_the_standard_library_does(text: str) -> None:
    """For what both of them read."""
    url, parts = read_url(text), urlsplit(text)

    assert url is not None
    assert (url.origin.scheme, url.origin.host) == (parts.scheme, parts.hostname)
    assert url.origin.port == (parts.port or {"https": 443, "http": 80}[parts.scheme])
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    assert url.target in (target, f"{target}?")  # the standard library drops a query that is empty
