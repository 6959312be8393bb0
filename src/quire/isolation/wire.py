"""What travels between the HTTP side and a core in its own process: frames of msgpack over an inherited socket pair.

::

    4 bytes, big-endian: length │ the message, one array: tag, fields

Both ends decode into declared types and nothing else; a frame that does not decode, or that is longer than what
the other side may send, is a breach of the protocol, after which nothing of the connection is believed.
"""

import struct
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec

from quire.config import EngineArgs, ModelShare
from quire.core.request import NewRequest
from quire.engine.channel import CoreInfo, CoreOutputs

MAX_FRAME_BYTES = 2**26
"""Of a core: the largest, log-probabilities of a chunk of a long prompt, stay well below."""
_HEADER = struct.Struct(">I")
RECEIVE_BYTES = 2**18
T = TypeVar("T")


class ProtocolError(Exception):
    """The other end sent what it may not send."""


class Start(msgspec.Struct, frozen=True, array_like=True, tag="start"):
    """To a new core, once: what it is to be."""

    args: EngineArgs
    model_path: str
    """The directory of the model's files, or its GGUF file."""
    share: ModelShare | None = None
    """Of the machine, in a server of several models."""


class Add(msgspec.Struct, frozen=True, array_like=True, tag="add"):
    """To the core: a request."""

    new: NewRequest


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """To the core: drop a request."""

    request_id: str


class Check(msgspec.Struct, frozen=True, array_like=True, tag="check"):
    """To the core: state the invariants; a core that breaks one ends."""


class Ready(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """Of the core, once: it takes requests."""

    info: CoreInfo


class StartFailed(msgspec.Struct, frozen=True, array_like=True, tag="failed"):
    """Of the core: it cannot start with these arguments. `kind` is a name in `quire.errors`."""

    kind: str
    message: str
    field: str | None


class Begun(msgspec.Struct, frozen=True, array_like=True, tag="begun"):
    """Of the core, before a step: the requests that enter with it, and how long the other side should wait for it."""

    entered: tuple[str, ...]
    allowed_s: float
    idle_timeout_s: float
    """How long all its threads may be idle meanwhile; infinite where a device computes."""


class Stepped(msgspec.Struct, frozen=True, array_like=True, tag="stepped"):
    """Of the core, after a step, or after requests left without one."""

    outputs: CoreOutputs


Command = Add | Abort | Check
Report = Ready | StartFailed | Begun | Stepped


def max_command_bytes(max_model_len: int) -> int:
    """The longest frame that a core takes: a request's tokens at 5 bytes each, and room for its lists, which are
    capped by `sampling_params`."""
    return 2**22 + 5 * max_model_len


def encode(message: Any) -> bytes:
    """A message as one frame."""
    body = _ENCODER.encode(message)
    return _HEADER.pack(len(body)) + body


_ENCODER = msgspec.msgpack.Encoder()


class Unframer:
    """Cuts what was received into messages.

    Args:
        kind: the type that each must have.
        max_bytes: of a frame's body.
    """

    def __init__(self, kind: Any, max_bytes: int) -> None:
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._max_bytes = max_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """Messages that are complete with `data`.

        Raises:
            ProtocolError: a frame is too long, or is no such message.
        """
        buffer = self._buffer
        buffer += data
        start = 0
        while len(buffer) - start >= _HEADER.size:
            (size,) = _HEADER.unpack_from(buffer, start)
            if size > self._max_bytes:
                raise ProtocolError(f"a frame of {size} bytes; at most {self._max_bytes} may come")
            end = start + _HEADER.size + size
            if end > len(buffer):
                break
            yield self._decode(bytes(buffer[start + _HEADER.size : end]))
            start = end
        del buffer[:start]

    def _decode(self, body: bytes) -> Any:
        try:
            return self._decoder.decode(body)
        except (msgspec.DecodeError, ValueError) as error:
            raise ProtocolError(f"a frame that is no message: {error}") from error
