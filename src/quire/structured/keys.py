"""Which keys a mapping has so far: a reader of YAML as `yaml.py` has it written, byte by byte, that stops at a key that
its mapping has already."""

from typing import NamedTuple

LONGEST_PLAIN, LONGEST_QUOTED = 64, 200
"""Characters of a key that no schema names."""
_NEWLINE, _SPACE, _QUOTE, _DASH, _COLON, _BACKSLASH, _BAR = b'\n "-:\\|'
_COMMA, _OPEN, _CLOSE, _OPEN_LIST, _CLOSE_LIST = b",{}[]"
START, DASH, PLAIN, QUOTED, QUOTED_END, COLON, BEHIND_KEY, LITERAL, CONTENT, VALUE, TEXT, FLOW, FLOW_KEY = range(13)
IN_KEY = frozenset((PLAIN, QUOTED, FLOW_KEY))
_Keys = frozenset[bytes]


class Place(NamedTuple):
    """A place in a document. What was read is not changed: a place that was kept is still right after others."""

    mode: int = START
    column: int = 0
    """Of the value that the line holds, behind its dashes."""
    text: bytes = b""
    """Of what may become a key."""
    mappings: tuple[tuple[int, _Keys], ...] = ()
    """In block style, by column."""
    flow: tuple[_Keys | None, ...] = ()
    """In flow style: the keys of an object, None for a list."""
    is_key_next: bool = False
    literal: int = 0
    """The indentation of the literal block that goes on; 0 outside of one."""
    is_escaped: bool = False

    @property
    def keys(self) -> _Keys:
        """Of the mapping at this place."""
        if self.mode == FLOW_KEY:
            return self.flow[-1] or frozenset()
        if self.mappings and self.mappings[-1][0] == self.column:
            return self.mappings[-1][1]
        return frozenset()

    @property
    def all_keys(self) -> set[bytes]:
        """Of all mappings that are open."""
        inner = [keys for keys in self.flow if keys]
        return set().union(*(keys for _, keys in self.mappings), *inner)


def after(place: Place, data: bytes) -> Place | None:
    """The place behind `data`, which the grammar allows; None where a key comes twice."""
    at: Place | None = place
    for byte in data:
        if at is None:
            return None
        at = _STEPS[at.mode](at, byte)
    return at


def _start(at: Place, byte: int) -> Place | None:
    if byte == _SPACE:
        column = at.column + 1
        is_content = 0 < at.literal <= column
        return at._replace(column=column, mode=CONTENT if is_content else START)
    if byte == _NEWLINE:
        return at._replace(column=0)
    is_dash = byte == _DASH
    mappings = tuple(one for one in at.mappings if one[0] < at.column or (one[0] == at.column and not is_dash))
    at = at._replace(mappings=mappings, literal=0)
    if is_dash:
        return at._replace(mode=DASH)
    if byte == _BAR:
        return at._replace(mode=LITERAL, literal=max(at.column, 2))
    if byte in (_OPEN, _OPEN_LIST):
        return _flow(at._replace(mode=FLOW), byte)
    if byte == _QUOTE:
        return at._replace(mode=QUOTED, text=b"", is_escaped=False)
    return at._replace(mode=PLAIN, text=bytes((byte,)))


def _dash(at: Place, byte: int) -> Place | None:
    return at._replace(mode=START, column=at.column + 2) if byte == _SPACE else at._replace(mode=VALUE)


def _plain(at: Place, byte: int) -> Place | None:
    if byte == _NEWLINE:
        return at._replace(mode=START, column=0)
    if byte == _COLON:
        return None if at.text in at.keys else at._replace(mode=COLON)
    return _longer(at, byte, LONGEST_PLAIN)


def _quoted(at: Place, byte: int) -> Place | None:
    if byte == _QUOTE and not at.is_escaped:
        return None if at.text in at.keys else at._replace(mode=QUOTED_END)
    return _longer(at, byte, LONGEST_QUOTED)


def _longer(at: Place, byte: int, longest: int) -> Place | None:
    """None as well where a key that comes twice cannot become another one."""
    text = at.text + bytes((byte,))
    if text in at.keys and len(text) >= longest and len(text.decode("utf-8", "replace")) >= longest:
        return None
    return at._replace(text=text, is_escaped=byte == _BACKSLASH and not at.is_escaped)


def _quoted_end(at: Place, byte: int) -> Place | None:
    return at._replace(mode=COLON) if byte == _COLON else at._replace(mode=START, column=0)


def _colon(at: Place, byte: int) -> Place | None:
    """A colon before another character than these is part of a plain text."""
    if byte not in (_SPACE, _NEWLINE):
        return at._replace(mode=VALUE)
    others = tuple(one for one in at.mappings if one[0] != at.column)
    at = at._replace(mappings=(*others, (at.column, at.keys | {at.text})), text=b"")
    return at._replace(mode=BEHIND_KEY) if byte == _SPACE else at._replace(mode=START, column=0)


def _behind_key(at: Place, byte: int) -> Place | None:
    if byte == _BAR:
        return at._replace(mode=LITERAL, literal=at.column + 2)
    if byte in (_OPEN, _OPEN_LIST):
        return _flow(at._replace(mode=FLOW), byte)
    return at._replace(mode=TEXT if byte == _QUOTE else VALUE, is_escaped=False)


def _until_line_ends(at: Place, byte: int) -> Place | None:
    return at._replace(mode=START, column=0) if byte == _NEWLINE else at


def _text(at: Place, byte: int) -> Place | None:
    if byte == _QUOTE and not at.is_escaped:
        return at._replace(mode=FLOW if at.flow else VALUE)
    return at._replace(is_escaped=byte == _BACKSLASH and not at.is_escaped)


def _flow(at: Place, byte: int) -> Place | None:
    if byte in (_OPEN, _OPEN_LIST):
        keys = frozenset[bytes]() if byte == _OPEN else None
        return at._replace(flow=(*at.flow, keys), is_key_next=byte == _OPEN)
    if byte in (_CLOSE, _CLOSE_LIST):
        flow = at.flow[:-1]
        return at._replace(flow=flow, mode=FLOW if flow else VALUE)
    if byte == _COMMA:
        return at._replace(is_key_next=at.flow[-1] is not None)
    if byte == _QUOTE:
        return at._replace(mode=FLOW_KEY if at.is_key_next else TEXT, text=b"", is_escaped=False, is_key_next=False)
    return at


def _flow_key(at: Place, byte: int) -> Place | None:
    if byte == _QUOTE and not at.is_escaped:
        keys = at.keys
        return None if at.text in keys else at._replace(mode=FLOW, flow=(*at.flow[:-1], keys | {at.text}))
    return _longer(at, byte, LONGEST_QUOTED)


_STEPS = {
    START: _start,
    DASH: _dash,
    PLAIN: _plain,
    QUOTED: _quoted,
    QUOTED_END: _quoted_end,
    COLON: _colon,
    BEHIND_KEY: _behind_key,
    LITERAL: _until_line_ends,
    CONTENT: _until_line_ends,
    VALUE: _until_line_ends,
    TEXT: _text,
    FLOW: _flow,
    FLOW_KEY: _flow_key,
}
