"""Which pages in a browser may use the server (CORS, https://fetch.spec.whatwg.org/#http-cors-protocol)."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from quire.errors import ConfigurationError

ANY = ("*",)
EXPOSED = ("X-Request-Id", "Request-Id", "Server-Timing", "Retry-After", "Deprecation", "Link")
"""Headers of answers that a script may read."""
_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.\-]*://[^\s/?#@,]+")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z\-]+")


@dataclass(frozen=True, slots=True)
class Cors:
    """What pages of other origins may do. Without origins: nothing.

    Raises:
        ConfigurationError: an origin, a method or a header that is none.
    """

    origins: tuple[str, ...] = ()
    methods: tuple[str, ...] = ANY
    headers: tuple[str, ...] = ANY
    credentials: bool = False
    hosts: tuple[str, ...] = ANY
    """Names under which the server is known, besides addresses and localhost."""

    def __post_init__(self) -> None:
        for name, values, form in (
            ("allowed_origins", self.origins, _ORIGIN),
            ("allowed_methods", self.methods, _TOKEN),
            ("allowed_headers", self.headers, _TOKEN),
        ):
            for value in values:
                if not form.fullmatch(value):
                    what = "'*' or scheme://host:port without a path" if form is _ORIGIN else "names, or '*'"
                    raise ConfigurationError(f"{name} must hold {what}, got {value!r}", field=name)


def listed(words: Iterable[str], name: str) -> tuple[str, ...]:
    """The values of a flag: words, or lists in JSON as vLLM takes them.

    Raises:
        ConfigurationError: a list that is none of strings.
    """
    found: list[str] = []
    for word in words:
        if not word.startswith("["):
            found.append(word)
            continue
        try:
            items = json.loads(word)
        except ValueError as error:
            raise ConfigurationError(f"{name} must be words or a JSON list of strings", field=name) from error
        if not all(isinstance(item, str) for item in items):
            raise ConfigurationError(f"{name} must be words or a JSON list of strings", field=name)
        found += items
    return tuple(found)
