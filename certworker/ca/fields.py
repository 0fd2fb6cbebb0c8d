"""Reads the fields of a JSON object that a stranger wrote; every fault names the answer and the field."""

import json
from datetime import UTC, datetime
from typing import Any

from certworker.ca.urls import is_url
from certworker.errors import AnswerFault

_LONGEST_LIST = 1000
"""More names than any CA puts into one certificate."""


class Fields:
    """One JSON object within the answer from `url`, and the path that leads to it."""

    def __init__(self, url: str, value: object, path: str = "") -> None:
        self._url = url
        self._path = path
        if not isinstance(value, dict):
            raise AnswerFault(url, f"{path.rstrip('.') or 'the answer'} must be an object")
        self._fields: dict[str, Any] = value

    def fault(self, name: str, rule: str) -> AnswerFault:
        """Return the error that says what is wrong with a field; the value itself may be secret."""
        return AnswerFault(self._url, f"{self._path}{name} {rule}")

    def has(self, name: str) -> bool:
        """Say whether the field is there; null is as good as absent, some CAs write it."""
        return self._fields.get(name) is not None

    def text(self, name: str) -> str:
        """Return a text that is not empty."""
        return self._text(name, self._fields.get(name))

    def flag(self, name: str) -> bool:
        """Return a boolean that is false when absent."""
        value = self._fields.get(name, False)
        if not isinstance(value, bool):
            raise self.fault(name, "must be true or false")
        return value

    def url(self, name: str) -> str:
        """Return an absolute URL of the scheme that the answer itself came by: https never leads to less."""
        return self._absolute(name, self._fields.get(name))

    def time(self, name: str) -> datetime:
        """Return an instant in UTC (RFC 3339)."""
        try:
            time = datetime.fromisoformat(self.text(name))
            if time.tzinfo is not None:
                return time.astimezone(UTC)
        except (ValueError, OverflowError):
            pass
        raise self.fault(name, "must be a time with its zone (RFC 3339)")

    def member(self, name: str) -> "Fields":
        """Return the object in this field."""
        return Fields(self._url, self._fields.get(name), f"{self._path}{name}.")

    def members(self, name: str) -> list["Fields"]:
        """Return the objects in this list."""
        return [Fields(self._url, value, f"{self._path}{name}[{i}].") for i, value in enumerate(self.entries(name))]

    def urls(self, name: str) -> tuple[str, ...]:
        """Return the URLs in this list, held to the same rule."""
        return tuple(self._absolute(f"{name}[{i}]", value) for i, value in enumerate(self.entries(name)))

    def entries(self, name: str) -> list[object]:
        """Return a list of moderate length."""
        value = self._fields.get(name)
        if not isinstance(value, list):
            raise self.fault(name, "is missing" if value is None else "must be a list")
        if len(value) > _LONGEST_LIST:
            raise self.fault(name, f"must have at most {_LONGEST_LIST} entries")
        return value

    def raw(self, name: str) -> object:
        """Return the value as it is, None when absent."""
        return self._fields.get(name)

    def _text(self, name: str, value: object) -> str:
        if not isinstance(value, str) or not value:
            raise self.fault(name, "is missing" if value is None else "must be a text")
        return value

    def _absolute(self, name: str, value: object) -> str:
        scheme = self._url.partition(":")[0]
        url = self._text(name, value)
        if not is_url(url, scheme):
            raise self.fault(name, f"must be an absolute {scheme} URL")
        return url


def read_json(url: str, body: bytes, content_type: str) -> object:
    """Parse the body of the answer from `url`; a page of a captive proxy is no JSON."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        # RecursionError is how the parser refuses to be nested too deeply.
        kind = content_type.partition(";")[0].strip()[:100] or "no content type"
        raise AnswerFault(url, f"it is not JSON ({kind!a}); check ACME_DIRECTORY_URL and proxies") from None
