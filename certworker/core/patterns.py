"""Which regular expressions a route may use: a small common language of Python, PCRE and nginx.

Everything that one of them reads differently, or that can take exponential time, is refused:
backreferences, look-around, inline flags, POSIX classes, a repetition of something that repeats or
chooses.
"""

import re

MAX_LENGTH = 256
MAX_ENDS = 64
"""How often a `$` may stand for the end: nginx is given an assertion for each, in one word of 4,096 bytes."""

_TOKEN = re.compile(
    r"""
      (?P<escape>\\[dDwWsS!-/:-@\[-`{-~])                  # a class, or punctuation taken literally
    | (?P<set>\[\^?\]?(?:(?!--|&&|\|\||~~)(?:\\[dDwWsS!-/:-@\[-`{-~]|[^\]\[\\]))*\])
    | (?P<open>\((?:\?:)?(?!\?))
    | (?P<close>\))
    | (?P<choice>\|)
    | (?P<option>\?)
    | (?P<repeat>[*+])
    | (?P<count>\{[0-9]{1,3}(?:,[0-9]{0,3})?\})
    | (?P<plain>[^\\\[\](){}|?*+])
    """,
    re.VERBOSE,
)


def check_regex(value: str) -> str:
    """Return `value` if every proxy reads it alike and matches it in bounded time."""
    if not 1 <= len(value) <= MAX_LENGTH or not (value.isascii() and value.isprintable()):
        raise ValueError(f"a regex has 1 to {MAX_LENGTH} printable ASCII characters")
    _check_tokens(_tokens(value))
    if value.count("$") > MAX_ENDS:
        raise ValueError(f"a regex has at most {MAX_ENDS} $")
    try:
        re.compile(value, re.ASCII)
    except re.error as refused:
        raise ValueError(f"not a regex: {refused}") from None
    return value


def replace_end(value: str, assertion: str) -> str:
    """Return a checked regex with `assertion` in place of each `$` that means the end of the text."""
    texts = (token[0] for token in _TOKEN.finditer(value))
    return "".join(assertion if text == "$" else text for text in texts)


def _tokens(value: str) -> list[str]:
    kinds: list[str] = []
    at = 0
    while at < len(value):
        token = _TOKEN.match(value, at)
        if token is None or token.lastgroup is None:
            raise ValueError(
                f"a regex has only classes, groups ( (?: and the repetitions ? * + {{n,m}}: see {value[at : at + 8]!r}"
            )
        kinds.append(token.lastgroup)
        at = token.end()
    return kinds


def _check_tokens(kinds: list[str]) -> None:
    """Refuse a repeated group that itself repeats or chooses: it may try exponentially many ways."""
    wild = [False]
    """For each open group: does it repeat or choose?"""
    closed_wild = False
    for before, kind in zip(["", *kinds], kinds, strict=False):
        match kind:
            case "open":
                wild.append(False)
            case "close":
                closed_wild = wild.pop() if len(wild) > 1 else False
                wild[-1] |= closed_wild
            case "repeat" if before == "close" and closed_wild:
                raise ValueError("a repeated group neither repeats nor chooses inside")
            case "count" if before == "close":
                # PCRE copies a counted group, up to a size at which it refuses the whole pattern.
                raise ValueError("a group is repeated with ? * or +")
            case "repeat" | "count" if before in ("repeat", "count", "option"):
                raise ValueError("a repetition is not repeated")
            case "repeat" | "count" | "option" | "choice":
                wild[-1] = True
            case _:
                pass
