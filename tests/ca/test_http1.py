"""Answers read by the letter of RFC 9112: however they are cut into pieces, and whatever a server sends instead."""

import http.client
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from certworker.ca.http1 import Answers, NotHttp, TooLarge, render_request

LIMIT = 1024

CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n3;name=value\r\nabc\r\n002\r\nde\r\n0\r\nTrailer: x\r\n\r\n"
)
GOOD = {
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}": b"{}",
    b"HTTP/1.1 200\r\ncontent-length:2  \r\nx:\t\r\n\r\n{}": b"{}",
    b"HTTP/1.1 103 Early Hints\r\nLink: <a>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n"
    b"Content-Length: 2\r\n\r\n{}": b"{}",
    b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\n\tc\r\nContent-Length: 2\r\n\r\n{}": b"{}",
    b"HTTP/1.1 404 \xe9\r\nX: \xff\r\nContent-Length: 0\r\n\r\n": b"",
    CHUNKED: b"abcde",
    b"HTTP/1.1 204 No Content\r\n\r\n": b"",
}
BROKEN = [
    b"SSH-2.0-x\r\n",
    b"\r\nHTTP/1.1 200 OK\r\n\r\n",
    b"HTTP/2 200 OK\r\n\r\n",
    b"HTTP/1.1 abc\r\n\r\n",
    b"HTTP/1.1 20 OK\r\n\r\n",
    b"HTTP/1.1 2000\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nspace : a\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n: a\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nx: a\0b\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nx: a\nb: c\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nx: a\rb\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 101 + b"\r\n",
    b"HTTP/1.1 200 OK\r\nA: " + b"b" * 40_000,
    b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: +1\r\n\r\n{",
    b"HTTP/1.1 200 OK\r\nContent-Length: \xb2\r\n\r\n{",
    b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n{",
    b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0x1\r\na\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;" + b"x" * 5000,
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"T: x\r\n" * 9000,
]


def receiving(data: bytes, cuts: list[int]) -> Answers:
    """Read what comes in pieces of these lengths, and then ends."""
    stream, lengths = io.BytesIO(data), iter(cuts)
    return Answers(lambda: stream.read(next(lengths, 16384)))


@given(st.sampled_from(sorted(GOOD)), st.lists(st.integers(1, 20), max_size=200))
def test_where_it_is_cut_does_not_matter(data: bytes, cuts: list[int]) -> None:
    """The same answer, and the next one on the connection after it."""
    answers = receiving(data, cuts)

    assert answers.read("GET", LIMIT).body == GOOD[data]
    with pytest.raises(ConnectionError):
        answers.read("GET", LIMIT)


@pytest.mark.parametrize("data", sorted(GOOD))
def test_it_is_what_the_standard_library_reads(data: bytes) -> None:
    """Status, fields and body; with folded lines put together."""
    ours = receiving(data, []).read("GET", LIMIT)
    theirs = read_by_library(data[data.rindex(b"HTTP/1.1") :])

    assert (ours.status, ours.body) == (theirs.status, theirs.read())
    assert ours.headers == {name.lower(): " ".join(value.split()) for name, value in theirs.getheaders()}


class Sent:
    """A socket as http.client reads it."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, _mode: str) -> io.BytesIO:
        return io.BytesIO(self._data)


def read_by_library(data: bytes) -> http.client.HTTPResponse:
    response = http.client.HTTPResponse(Sent(data))  # type: ignore[arg-type]
    response.begin()
    return response


@pytest.mark.parametrize("data", BROKEN)
def test_what_is_not_by_the_letter_is_refused(data: bytes) -> None:
    """As soon as it can be seen, not when the server has no more to say."""
    with pytest.raises(NotHttp):
        Answers(iter([data, b"{}" * LIMIT]).__next__).read("GET", LIMIT)


@given(st.binary(max_size=200), st.sampled_from([b"", b"HTTP/1.1 200 OK\r\n", CHUNKED[:48]]))
def test_anything_is_read_or_refused(data: bytes, begin: bytes) -> None:
    """In one of the ways that the transport expects."""
    try:
        answer = receiving(begin + data, []).read("GET", LIMIT)
    except (NotHttp, TooLarge, ConnectionError):
        return
    assert len(answer.body) <= LIMIT


@pytest.mark.parametrize(
    ("data", "is_last"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: Keep-Alive\r\n\r\n{}", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: x , Close\r\n\r\n{}", True),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}", True),
        (b"HTTP/1.1 200 OK\r\n\r\n{}", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}HTTP/1.1 200 OK\r\n", True),
    ],
)
def test_a_connection_is_kept_if_the_next_answer_is_sure(data: bytes, is_last: bool) -> None:
    """Not if it ends, and not if more has come than was asked for."""
    assert receiving(data, []).read("GET", LIMIT).is_last == is_last


def test_head_has_no_body() -> None:
    """Its length is that of the answer to a GET."""
    assert receiving(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", []).read("HEAD", LIMIT).body == b""


@pytest.mark.parametrize("body", [None, b"", b"{}"])
def test_a_request_is_one_piece(body: bytes | None) -> None:
    """With a length if it has a body, also an empty one."""
    sent = render_request("POST", "/a?b", "ca.test:14000", {"User-Agent": "x"}, body)

    head, _, rest = sent.partition(b"\r\n\r\n")
    assert head.split(b"\r\n")[:2] == [b"POST /a?b HTTP/1.1", b"Host: ca.test:14000"]
    assert rest == (body or b"")
    assert (b"Content-Length: %d" % len(rest) in head.split(b"\r\n")) == (body is not None)
