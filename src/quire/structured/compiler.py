"""Grammars where tokens are sampled: compiled beside the step loop, kept, and followed by one matcher a sequence."""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from quire.errors import ShapeError
from quire.structured.closing import Closer, TextTokens
from quire.structured.matcher import Matcher
from quire.structured.reasoning import ReasoningBound
from quire.structured.samples import extras_of, is_yaml, lines_of, samples_of
from quire.structured.source import limits
from quire.structured.unique import KeyTokens, UniqueKeys

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

T = TypeVar("T")
KEPT_GRAMMARS, KEPT_BYTES = 128, 2**22
"""Grammars that are known to compile, and their texts together."""
MOST_STARTED = 1024
"""Matchers that wait for the row of their request."""
_STACK_BYTES = 2**27
"""llguidance goes from rule to rule of a long grammar: twice what the process that checks it may use."""
_LONGEST = 4096
"""The longest of shortest answers that is looked for, in tokens."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a model, as a grammar sees them."""

    tokens: Sequence[bytes]
    """By id, as many as there are logits; b"" where an id means nothing."""
    special_token_ids: Sequence[int]
    """Tokens that are no text: no grammar allows them."""
    eos_token_ids: Sequence[int]
    """At least one: what may come where an answer is complete."""
    encode: Callable[[str], Sequence[int]]
    """How the model's tokenizer writes a text."""


@dataclass(frozen=True, slots=True)
class _Compiled:
    closer: Closer
    shortest: tuple[int, ...] | None
    """An answer, as short as was found."""
    may_be_cut: bool = False
    """Whether the answer may be any text where it ends."""
    reasoning: Callable[[], ReasoningBound] | None = None
    """The bound on the reasoning of one answer."""

    def check_room(self, max_tokens: int) -> None:
        """See that an answer fits.

        Raises:
            ShapeError: the shortest does not, its end included.
        """
        if self.shortest is not None and len(self.shortest) >= max_tokens:
            needed = len(self.shortest) + 1
            allowed = f"{max_tokens} are allowed: raise max_tokens, or max_model_len"
            raise ShapeError(f"needs {needed} tokens for its shortest answer with its end; {allowed}")


class GrammarSpec(Protocol):
    """What a request says of its grammar; see `quire.core.request`."""

    @property
    def source(self) -> str:
        """As `source.py` writes it."""

    @property
    def max_tokens(self) -> int:
        """Of the answer, its end of sequence included."""


class _HasSampling(Protocol):
    @property
    def new(self) -> Any: ...


class GrammarCompiler:
    """Compiles grammars in a thread of its own, which ends with it. Its methods are for one thread.

    Args:
        read_vocabulary: called once, in that thread, when the first grammar comes.
        num_threads: for the masks of a step.
    """

    def __init__(self, read_vocabulary: Callable[[], Vocabulary], num_threads: int = 1) -> None:
        self._read_vocabulary = read_vocabulary
        self._num_threads = num_threads
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        """Of the jobs."""
        self._jobs: OrderedDict[str, deque[tuple[Callable[[str], Any], Future[Any]]]] = OrderedDict()
        """By source: each has one done in its turn, so that many answers to a grammar that is slow to start keep the
        others waiting for one of them."""
        self._tokenizer: LLTokenizer | None = None
        self._texts: TextTokens | None = None
        self._encode: Callable[[str], Sequence[int]] = str.encode
        self._tokens: Sequence[bytes] = ()
        self._executor: LLExecutor | None = None
        self._kept: OrderedDict[str, Future[_Compiled]] = OrderedDict()
        self._kept_bytes = 0
        self._texts_of_tokens: Sequence[bytes] = ()
        self._key_tokens: KeyTokens | None = None
        self._started: OrderedDict[str, Future[LLMatcher | UniqueKeys]] = OrderedDict()
        """By request, until it has a row."""

    def ready(self, request: _HasSampling) -> str | None:
        """The admission rule: a request waits while its grammar is being compiled, which the first call begins.

        Returns:
            None, or `grammar`.

        Raises:
            ShapeError: it does not compile.
        """
        grammar = request.new.sampling.grammar
        if grammar is None:
            return None
        known = self._begin(grammar.source)
        if not known.done():
            return "grammar"
        known.result().check_room(grammar.max_tokens)
        started = self._start(request.new.request_id, grammar.source)
        if not started.done():
            return "grammar"
        started.result()
        return None

    def matcher(self, request_id: str, grammar: GrammarSpec) -> Matcher:
        """A matcher at the beginning of the answer of a request; waits where it is not compiled yet.

        Each answer has one of its own, and none is a copy: copies share their automata, which are bounded, so that what
        others have written would decide how far an answer can go.

        Raises:
            ShapeError: it does not compile.
        """
        found = self._begin(grammar.source).result()
        inner = self._start(request_id, grammar.source).result()
        self._started.pop(request_id, None)
        assert self._tokenizer is not None
        return Matcher(
            inner,
            found.closer,
            self._tokenizer.eos_tokens,
            found.shortest,
            grammar.max_tokens,
            may_be_cut=found.may_be_cut,
            reasoning=None if found.reasoning is None else found.reasoning(),
        )

    def _start(self, request_id: str, source: str) -> "Future[LLMatcher | UniqueKeys]":
        future = self._started.get(request_id)
        if future is None:
            future = self._started[request_id] = self._submit(self._new_matcher, source)
            while len(self._started) > MOST_STARTED:
                self._started.popitem(last=False)  # of a request that went, or that has it compiled again
        return future

    def fill_masks(self, matchers: "Sequence[Matcher]", masks: NDArray[np.uint32]) -> None:
        """Which tokens may come next.

        Args:
            masks: `[at least as many as matchers, ceil(vocabulary / 32)]`; bit `i % 32` of word `i // 32` says it of
                token `i`.
        """
        if self._executor is None:
            from llguidance import LLExecutor

            self._executor = LLExecutor(self._num_threads)
        assert masks.flags.c_contiguous and len(matchers) <= len(masks)
        jobs = [
            (one.raw if isinstance(one := matcher.inner, UniqueKeys) else one, place)
            for place, matcher in enumerate(matchers)
        ]
        self._executor.unsafe_compute_mask_ptr(jobs, masks.ctypes.data, masks.strides[0], len(masks))
        for matcher, mask in zip(matchers, masks, strict=False):
            if isinstance(matcher.inner, UniqueKeys):
                matcher.inner.exclude(mask.view(np.uint8))

    def shortest(self, source: str) -> Sequence[int] | None:
        """An answer as short as was found, its end of sequence not among it; None if none was found. Waits.

        Raises:
            ShapeError: the grammar does not compile.
        """
        return self._begin(source).result().shortest

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary; 0 before the first grammar is compiled."""
        return 0 if self._tokenizer is None else int(self._tokenizer.vocab_size)

    def _begin(self, source: str) -> "Future[_Compiled]":
        future = self._kept.get(source)
        if future is not None:
            self._kept.move_to_end(source)
            return future
        future = self._kept[source] = self._submit(self._compile, source)
        self._kept_bytes += len(source) + 200
        self._forget_oldest()
        return future

    def _submit(self, function: Callable[[str], T], source: str) -> "Future[T]":
        future: Future[T] = Future()
        with self._lock:
            self._jobs.setdefault(source, deque()).append((function, future))
        if self._pool is not None:
            self._pool.submit(self._do_next)
            return future
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="quire-grammar")
        usual = threading.stack_size(_STACK_BYTES)
        try:
            self._pool.submit(self._do_next)  # starts the thread
        finally:
            threading.stack_size(usual)
        return future

    def _do_next(self) -> None:
        """In the thread, once for each job."""
        with self._lock:
            source, jobs = self._jobs.popitem(last=False)
            function, future = jobs.popleft()
            if jobs:
                self._jobs[source] = jobs
        try:
            future.set_result(function(source))
        except BaseException as error:  # noqa: BLE001 - for the one who asked, as an executor does it
            future.set_exception(error)

    def _forget_oldest(self) -> None:
        """Those that are being compiled stay: a request waits for each."""
        for source in [name for name, future in self._kept.items() if future.done()]:
            if self._kept_bytes <= KEPT_BYTES and len(self._kept) <= KEPT_GRAMMARS:
                return
            del self._kept[source]
            self._kept_bytes -= len(source) + 200

    def _compile(self, source: str) -> _Compiled:
        """In the thread. The compiler lets go of the interpreter meanwhile."""
        if self._tokenizer is None or self._texts is None:
            vocabulary = self._read_vocabulary()
            wrapped = _Wrapped(vocabulary)
            self._texts, self._encode = TextTokens(wrapped.token_of, len(vocabulary.tokens)), wrapped
            self._tokens = vocabulary.tokens
            self._tokenizer = _tokenizer(wrapped, vocabulary)
            self._texts_of_tokens = wrapped.texts
        matcher = self._new_matcher(source)
        extras = extras_of(source)
        ends = [self._mark(end) for end in extras.get("ends", ())]
        samples = [self._encode(text) for text in samples_of(source)]
        closer = Closer(self._texts, samples, ends, lines_of(source), self._encode)
        shortest = closer.shortest(matcher, _LONGEST)
        return _Compiled(
            closer,
            None if shortest is None else tuple(shortest),
            extras.get("may_be_cut", False),
            self._bound(extras["reasoning"]) if "reasoning" in extras else None,
        )

    def _mark(self, mark: str | int) -> Sequence[int]:
        """A marker as tokens."""
        return [mark] if isinstance(mark, int) else self._encode(mark)

    def _bound(self, reasoning: Mapping[str, Any]) -> Callable[[], ReasoningBound]:
        begin, end = reasoning["begin"], reasoning["end"]
        return partial(
            ReasoningBound,
            begin.encode() if isinstance(begin, str) else begin,
            tuple(self._mark(end)),
            end.encode() if isinstance(end, str) else b"",
            reasoning["max_tokens"],
            self._tokens,
        )

    def _new_matcher(self, source: str) -> "LLMatcher | UniqueKeys":
        """In the thread, after the vocabulary is there."""
        from llguidance import LLMatcher

        assert self._tokenizer is not None
        try:
            matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=limits())
        except BaseException as error:  # a panic of the library is no `Exception`
            raise ShapeError("cannot be compiled: its compiler failed") from error
        if matcher.is_error():
            raise ShapeError(f"cannot be compiled: {matcher.get_error()[:500]}")
        if not is_yaml(source):
            return matcher
        if self._key_tokens is None:
            self._key_tokens = KeyTokens(self._texts_of_tokens)
        return UniqueKeys(matcher, self._key_tokens)


class _Wrapped:
    """What llguidance asks of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens = list(vocabulary.tokens)
        self.special_token_ids = list(vocabulary.special_token_ids)
        self.eos_token_id = vocabulary.eos_token_ids[0]
        self._encode = vocabulary.encode
        self._special = frozenset(vocabulary.special_token_ids)

    def __call__(self, text: bytes | str) -> list[int]:
        """The tokens of a text, whose bytes are that text's: where the tokenizer writes a beginning otherwise, or takes
        a part for a special token, the longest tokens that fit, one after the other."""
        data = text.encode() if isinstance(text, str) else text
        found = list(self._encode(data.decode("utf-8", "replace")))
        spelled = b"".join(self.tokens[token_id] for token_id in found)
        return found if spelled == data and self._special.isdisjoint(found) else self._longest(data)

    @property
    def texts(self) -> list[bytes]:
        """By id; b"" for special tokens."""
        return [b"" if token_id in self._special else text for token_id, text in enumerate(self.tokens)]

    def token_of(self, text: bytes) -> int | None:
        """The token that is this text."""
        return self._ids.get(text)

    def _longest(self, data: bytes) -> list[int]:
        found, start = [], 0
        while start < len(data):
            end = next(
                end for end in range(min(len(data), start + self._width), start, -1) if data[start:end] in self._ids
            )
            found.append(self._ids[data[start:end]])
            start = end
        return found

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        return {text: token_id for token_id, text in enumerate(self.tokens) if text and token_id not in self._special}

    @cached_property
    def _width(self) -> int:
        return max(map(len, self._ids))


def _tokenizer(wrapped: Any, vocabulary: Vocabulary) -> "LLTokenizer":
    from llguidance import LLTokenizer

    return LLTokenizer(wrapped, len(vocabulary.tokens), list(vocabulary.eos_token_ids))
