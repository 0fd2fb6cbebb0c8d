"""HTTP/1.1 as we speak it: one request at a time, and its answer read by the letter (RFC 9112).

What is not by the letter is refused, and everything has a limit, so that no server can keep us reading. The
standard library's http.client hands header fields to a parser for e-mail: half a millisecond of a certificate's two.
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

_HEAD_LIMIT = 32 * 1024
"""Bytes of status line and fields together; CAs send some four hundred."""
_MOST_FIELDS = 100
_SIZE_LIMIT = 1024
"""Bytes of the line that begins a chunk."""
_BEGIN = b"HTTP/1."
_STATUS_LINE = re.compile(r"HTTP/1\.([0-9]) ([1-9][0-9]{2})(?: .*)?")
_FIELDS = re.compile(r"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]++:[^\0\r\n]*+(?:\r\n|\Z))*+")
_FOLD = re.compile(r"\r\n[ \t]+")
_LENGTH = re.compile(r"[0-9]{1,18}")
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;.*)?")


class NotHttp(Exception):
    """What came is no HTTP answer; the message says what is wrong with it."""


class TooLarge(Exception):
    """The answer is larger than was allowed."""


class Head(NamedTuple):
    """What an answer begins with."""

    minor: int
    """Of the protocol's version, 1.0 or 1.1."""
    status: int
    headers: Mapping[str, str]
    """Names in lower case; a field that came twice is joined with a comma (RFC 9110 §5.3)."""

    @property
    def is_last(self) -> bool:
        """Whether the connection ends with this answer (RFC 9112 §9.3); 1.0 ends it unless both sides say otherwise."""
        options = self.headers.get("connection", "").lower().split(",")
        return self.minor == 0 or "close" in map(str.strip, options)


class Answer(NamedTuple):
    """A whole answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    is_last: bool
    """Whether no other may follow on its connection."""


class Answers:
    """The answers on one connection, one after the other."""

    def __init__(self, receive: Callable[[], bytes]) -> None:
        """Read what `receive` returns: some bytes, or none when the connection has ended."""
        self._receive = receive
        self._held = bytearray()
        """What has come and is not read yet."""

    def read(self, method: str, max_bytes: int) -> Answer:
        """Return the answer to a request of `method`.

        Raises NotHttp, TooLarge for a body of more than `max_bytes`, ConnectionError if the connection ends before it.
        """
        head = self.read_head()
        body, ends = self._read_body(head, method, max_bytes)
        # What follows was not asked for: whose answer it would pass for, nobody knows.
        return Answer(head.status, head.headers, body, ends or head.is_last or bool(self._held))

    def read_head(self) -> Head:
        """Return status and fields of the next answer that is final; interim ones say nothing to us."""
        while True:
            head = self._take_head()
            line, _, fields = head.partition("\r\n")
            start = _STATUS_LINE.fullmatch(line)
            if start is None:
                raise NotHttp("no status line")
            if int(start[2]) >= 200:
                return Head(int(start[1]), int(start[2]), _read_fields(fields))

    def _take_head(self) -> str:
        while (end := self._held.find(b"\r\n\r\n")) < 0:
            if not _BEGIN.startswith(self._held[: len(_BEGIN)]):
                raise NotHttp("no status line")  # now: what speaks another protocol may wait for us
            if len(self._held) > _HEAD_LIMIT:
                raise NotHttp("endless header fields")
            self._receive_more()
        head = self._take(end + 4)[:end].decode("latin-1")
        # RFC 9112 §5.2: a field that goes on in the next line reads as if it did not.
        return _FOLD.sub(" ", head) if "\r\n " in head or "\r\n\t" in head else head

    def _read_body(self, head: Head, method: str, max_bytes: int) -> tuple[bytes, bool]:
        """Return the body, and whether it was the connection's end that ended it (RFC 9112 §6.3)."""
        if method == "HEAD" or head.status in (204, 304):
            return b"", False
        coding, length = head.headers.get("transfer-encoding"), head.headers.get("content-length")
        if coding is not None:
            if coding.lower() != "chunked" or length is not None:
                raise NotHttp("a body of uncertain length")
            return self._take_chunks(max_bytes), False
        if length is None:
            return self._take_rest(max_bytes), True
        if not _LENGTH.fullmatch(length):
            raise NotHttp("a body of uncertain length")
        if int(length) > max_bytes:
            raise TooLarge
        return self._take(int(length)), False

    def _take_chunks(self, max_bytes: int) -> bytes:
        """RFC 9112 §7.1; the fields behind the last chunk say nothing to us."""
        body = bytearray()
        while True:
            found = _SIZE.fullmatch(self._take_line(_SIZE_LIMIT))
            if found is None:
                raise NotHttp("no size of a chunk")
            size = int(found[1], 16)
            if not size:
                break
            if len(body) + size > max_bytes:
                raise TooLarge
            body += self._take(size)
            if self._take(2) != b"\r\n":
                raise NotHttp("no end of a chunk")
        left = _HEAD_LIMIT
        while line := self._take_line(left):
            left -= len(line)
        return bytes(body)

    def _take_line(self, limit: int) -> bytes:
        while (end := self._held.find(b"\r\n")) < 0:
            if len(self._held) > limit:
                raise NotHttp("an endless line")
            self._receive_more()
        return self._take(end + 2)[:end]

    def _take(self, count: int) -> bytes:
        while len(self._held) < count:
            self._receive_more()
        taken = bytes(self._held[:count])
        del self._held[:count]
        return taken

    def _take_rest(self, max_bytes: int) -> bytes:
        while len(self._held) <= max_bytes:
            data = self._receive()
            if not data:
                return self._take(len(self._held))
            self._held += data
        raise TooLarge

    def _receive_more(self) -> None:
        data = self._receive()
        if not data:
            raise ConnectionResetError
        self._held += data


def render_request(method: str, target: str, authority: str, headers: Mapping[str, str], body: bytes | None) -> bytes:
    """Print a request; its headers are ours, and so are known to be no more than one line."""
    lines = [f"{method} {target} HTTP/1.1", f"Host: {authority}", "Accept-Encoding: identity"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("ascii") + (body or b"")


def _read_fields(fields: str) -> dict[str, str]:
    if fields.count("\r\n") >= _MOST_FIELDS:
        raise NotHttp("endless header fields")
    if not _FIELDS.fullmatch(fields):
        raise NotHttp("a broken header field")
    headers: dict[str, str] = {}
    for field in fields.split("\r\n") if fields else ():
        name, _, value = field.partition(":")
        name, value = name.lower(), value.strip(" \t")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers
