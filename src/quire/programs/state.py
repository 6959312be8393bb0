"""The state of a program: what has been said, with places that are being filled while the program goes on.

::

    s += assistant("Name: ", gen("name"), "\\nCity: ", gen("city"))
                    text      place          text        place        a place waits for those before it alone

    forks = s.fork(2)      each begins with the same turns, the places in them included
"""

import asyncio
from collections.abc import Iterator, Mapping
from concurrent import futures
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Self

from quire.errors import InvalidRequestError, ProgramError, QuireError, unknown_name_message
from quire.programs.backend import Prompt, Usage
from quire.programs.parts import Gen, Pieces, Select, Turn, joined
from quire.programs.scoring import common_length, score, tree_of
from quire.programs.session import Session

OTHER_TEXT = "\x01"
"""No option begins with it."""
MAX_FORKS = 1024
"""Of one `fork`."""


@dataclass(frozen=True, slots=True)
class Call:
    """What filled a variable."""

    name: str
    prompt: Prompt
    text: str
    finish_reason: str | None
    """None for `select`."""
    usage: Usage
    given: Mapping[str, Any]
    """Fields of `SamplingParams`, the seed of the place among them: with `prompt` they make the same call again."""
    scores: dict[str, float] = field(default_factory=dict)
    """Option -> mean log-probability, of a `select`."""


@dataclass(frozen=True, slots=True)
class Place:
    """A piece of a turn that is being filled."""

    name: str
    call: "Future[Call]"


@dataclass(slots=True)
class _Turn:
    role: str | None
    """None: the text of a program without roles."""
    pieces: list[str | Place]

    async def text(self) -> str:
        """Once its places are filled."""
        found = [
            piece if isinstance(piece, str) else (await asyncio.wrap_future(piece.call)).text for piece in self.pieces
        ]
        return "".join(found)


class State:
    """What a program has said so far. `state += ...` says more: a turn (`user("Hi")`), or, within a turn and in a
    program without roles, text, `gen` and `select`. `state[name]` is the text of a variable, waited for;
    `state.call(name)` how it came about. `state.usage` counts what its calls took, those of its forks included, and
    `state.returned` is what the program's function returned.

    Args:
        session: runs the calls.
        seed: with the place of a call in its program, the seed of a call that is given none.
        parent: the state that this one is a fork of; counts what this one uses.
    """

    def __init__(self, session: Session, seed: str, parent: "State | None" = None) -> None:
        self._session = session
        self._seed = seed
        self._parent = parent
        self._turns: list[_Turn] = [] if parent is None else _copied(parent._turns)
        self._is_open: bool = parent is not None and parent._is_open
        """The last turn goes on."""
        self._variables: dict[str, Place] = {} if parent is None else dict(parent._variables)
        self._places: list[Place] = []
        """Its own, in their order."""
        self._forks: list[State] = []
        self.usage = Usage()
        """What its calls took, those of its forks included."""
        self.returned: Any = None
        """What the program's function returned."""
        self.failure: Exception | None = None
        """What the program's function raised, in a batch."""

    def __iadd__(self, more: str | Pieces | Turn) -> Self:
        """Go on.

        Raises:
            InvalidRequestError: it does not fit here.
        """
        if isinstance(more, Turn):
            with self._turn(more.role):
                self._write(more.pieces)
            return self
        pieces = joined(more)
        if not self._is_open:
            if self._turns:
                raise _bad("text outside of a turn: this program has roles (system, user, assistant)")
            self._turns.append(_Turn(None, []))
            self._is_open = True
        self._write(pieces)
        return self

    @contextmanager
    def _turn(self, role: str) -> Iterator[None]:
        if self._is_open:
            inside = self._turns[-1].role
            what = "a program without roles" if inside is None else f"the turn of {inside}"
            raise _bad(f"a turn of {role} inside {what}")
        self._turns.append(_Turn(role, []))
        self._is_open = True
        try:
            yield
        finally:
            self._is_open = False

    def system(self) -> Any:
        """`with s.system():` what is added is the system's turn."""
        return self._turn("system")

    def user(self) -> Any:
        """`with s.user():` what is added is the user's turn."""
        return self._turn("user")

    def assistant(self) -> Any:
        """`with s.assistant():` what is added is the assistant's turn, with Python between the pieces."""
        return self._turn("assistant")

    def fork(self, count: int = 2) -> "Forks":
        """Copies that go on by themselves, at the same time; their calls share what has been said so far.

        Raises:
            InvalidRequestError: a count out of range.
        """
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_FORKS:
            raise _bad(f"fork takes 1 to {MAX_FORKS} copies, got {count!r:.40}")
        first = len(self._forks)
        forks = [State(self._session, f"{self._seed}/{first + index}", self) for index in range(count)]
        self._forks += forks
        return Forks(forks)

    def __getitem__(self, name: str) -> str:
        """The text of a variable, waited for; errors as for `call`."""
        return self.call(name).text

    def __contains__(self, name: object) -> bool:
        return name in self._variables

    def call(self, name: str) -> Call:
        """The last call that filled a variable, waited for.

        Raises:
            ProgramError: it failed, or one before it did.
            InvalidRequestError: there is no such variable.
        """
        place = self._variables.get(name)
        if place is not None:
            return _result(place)
        if self.failure is not None:
            raise ProgramError(f"the program failed before {name!r}: {self.failure}", name) from self.failure
        raise InvalidRequestError(unknown_name_message("variable", str(name), self._variables), param=str(name))

    @property
    def calls(self) -> list[Call]:
        """All of its own, in their order; errors as for `call`."""
        return [_result(place) for place in self._places]

    @property
    def error(self) -> Exception | None:
        """The first failure of the state, waited for: of a call, or of the program's function. None: it is whole."""
        for place in self._places:
            try:
                _result(place)
            except ProgramError as error:
                return error
        return self.failure

    def messages(self) -> list[dict[str, str]]:
        """The conversation, waited for; errors as for `call`.

        Raises:
            InvalidRequestError: the program has no roles.
        """
        if any(turn.role is None for turn in self._turns):
            raise _bad("messages of a program without roles: see text()")
        return [{"role": turn.role or "", "content": _text(turn)} for turn in self._turns]

    def text(self) -> str:
        """All that was said, waited for; with roles a line `role: text` for each turn. Errors as for `call`."""
        return "\n".join(_text(turn) if turn.role is None else f"{turn.role}: {_text(turn)}" for turn in self._turns)

    def wait(self) -> None:
        """Wait for all calls, those of forks included, whatever becomes of them."""
        futures.wait([place.call for place in self._places])
        for fork in self._forks:
            fork.wait()

    def _write(self, pieces: Pieces) -> None:
        turn = self._turns[-1]
        for item in pieces.items:
            if isinstance(item, str):
                turn.pieces.append(item)
                continue
            if turn.role not in (None, "assistant"):
                raise _bad(f"{item.name!r} stands in the turn of {turn.role}: a model fills the assistant's")
            before = _copied(self._turns)
            seed = _seed(f"{self._seed}:{len(self._places)}")
            place = Place(item.name, self._session.submit(self._fill(item, before, seed)))
            self._places.append(place)
            self._variables[item.name] = place
            turn.pieces.append(place)

    async def _fill(self, item: Gen | Select, before: list[_Turn], seed: int) -> Call:
        texts = [await turn.text() for turn in before]
        messages = None
        if before[0].role is not None:
            each = zip(before[:-1], texts[:-1], strict=True)
            messages = tuple({"role": str(turn.role), "content": text} for turn, text in each)
        prompt = Prompt(messages, texts[-1], self._session.chat_template_kwargs)
        try:
            call = await (self._gen(item, prompt, seed) if isinstance(item, Gen) else self._select(item, prompt))
        except (ProgramError, asyncio.CancelledError):
            raise
        except Exception as error:
            kind = "gen" if isinstance(item, Gen) else "select"
            raise ProgramError(f"{kind}({item.name!r}): {error}", item.name) from error
        state: State | None = self
        while state is not None:
            state.usage.add(call.usage)
            state = state._parent
        return call

    async def _gen(self, item: Gen, prompt: Prompt, seed: int) -> Call:
        backend = self._session.backend
        answer = await self._session.patiently(lambda: backend.generate(prompt, item.given, seed))
        return Call(item.name, prompt, answer.text, answer.finish_reason, answer.usage, {"seed": seed, **item.given})

    async def _select(self, item: Select, prompt: Prompt) -> Call:
        backend, usage = self._session.backend, Usage()
        # A turn that is begun may hold what the prompt for one does not (an empty reasoning): any other text shows it.
        begun = prompt if prompt.text or prompt.messages is None else prompt.extended(OTHER_TEXT)
        texts = [begun, *(prompt.extended(option) for option in item.options)]
        before, *paths = await asyncio.gather(*map(backend.encode, texts))
        start = common_length([before, *paths])
        tree = tree_of(paths, start)
        likelihoods = await self._session.patiently(lambda: backend.likelihoods(tree, usage))
        found = [score(path, start, tree, likelihoods) for path in paths]
        scores = dict(zip(item.options, found, strict=True))
        return Call(item.name, prompt, max(item.options, key=scores.__getitem__), None, usage, {}, scores)


class Forks(list[State]):
    """States that were forked from one: `forks[0] += ...`. One that fails does not disturb the others."""

    def join(self) -> Self:
        """Wait for all of them.

        Raises:
            ProgramError: of the first that failed.
        """
        for state in self:
            state.wait()
        for place, state in enumerate(self):
            error = state.error
            if error is not None:
                name = error.variable if isinstance(error, ProgramError) else None
                raise ProgramError(f"fork {place}: {error}", name) from error
        return self

    def values(self, name: str) -> list[str]:
        """The variable of each fork, waited for; errors as for `State.call`."""
        return [state[name] for state in self]


def _copied(turns: list[_Turn]) -> list[_Turn]:
    return [_Turn(turn.role, [*turn.pieces]) for turn in turns]


def _result(place: Place) -> Call:
    try:
        return place.call.result()
    except (CancelledError, QuireError) as error:
        if isinstance(error, ProgramError) and error.variable == place.name:
            raise
        text = "the run has ended" if isinstance(error, CancelledError) else str(error)
        raise ProgramError(f"{place.name!r} was not filled: {text}", place.name) from error


def _text(turn: _Turn) -> str:
    return "".join(piece if isinstance(piece, str) else _result(piece).text for piece in turn.pieces)


def _seed(place: str) -> int:
    """48 bits, which every server's JSON can hold."""
    return int.from_bytes(blake2b(place.encode(), digest_size=6).digest(), "big")


def _bad(text: str) -> InvalidRequestError:
    return InvalidRequestError(f"a program: {text}", param="program")
