"""Which modules a config means: names, `re:` patterns, or classes."""

import re
from collections.abc import Iterable

from quire.errors import ModelFileError, UnsupportedModelError
from quire.weights.json_file import printable

CLASSES = frozenset({"Linear", "Embedding"})
MAX_STEPS = 2 * 10**8
"""Most steps of matching that one config may cost, counted before a pattern is tried: a name's length to the power of
the pattern's repetitions, times the ways to choose among its options. `.*mlp\\.(gate|up)_proj$` costs 80 for a name."""

_REPEATED_GROUP = re.compile(r"\)[*+?{]|\\[1-9]|\(\?(?!:)|[*+?}][*+?{]")
_REPETITION = re.compile(r"(?<!\\)(?:\\\\)*[*+{]")
_ONE_CHARACTER = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)


class ModulePatterns:
    """The names and patterns of one list of a config."""

    def __init__(self, entries: Iterable[str], where: str) -> None:
        """
        Args:
            where: the list's name, for errors.

        Raises:
            UnsupportedModelError: a pattern with repetitions of groups, which may take for ever to match.
            ModelFileError: a pattern that is none.
        """
        self._where, self._steps = where, 0
        entries = list(entries)
        self.names = frozenset(entry for entry in entries if not entry.startswith("re:"))
        self._patterns = [self._compiled(entry.removeprefix("re:")) for entry in entries if entry.startswith("re:")]

    def match(self, module: str) -> bool:
        """Whether a name or a pattern (from its beginning, as compressed-tensors has it) is the module's.

        Raises:
            ModelFileError: matching would take too long.
        """
        return module in self.names or any(self._tried(*pattern, module) for pattern in self._patterns)

    def matches_class(self) -> bool:
        """Whether a class of modules is named."""
        return not self.names.isdisjoint(CLASSES)

    def _tried(self, pattern: re.Pattern[str], repetitions: int, choices: int, module: str) -> bool:
        self._steps += len(module) ** repetitions * choices
        if self._steps > MAX_STEPS:
            raise ModelFileError(f"{self._where}: the pattern {printable(pattern.pattern)} takes too long to match")
        return pattern.match(module) is not None

    def _compiled(self, text: str) -> tuple[re.Pattern[str], int, int]:
        if _REPEATED_GROUP.search(text):
            raise UnsupportedModelError(
                f"{self._where}: the pattern {printable(text)} is not supported: it repeats a group or looks around"
            )
        try:
            # What matches at the end of a pattern that need not match to the end changes nothing.
            pattern = re.compile(re.sub(r"(?:(?<!\\)\.\*)+$", "", text) if text != ".*" else "")
        except (re.error, RecursionError, OverflowError) as error:
            raise ModelFileError(f"{self._where}: {printable(text)} is no pattern: {str(error)[:60]}") from None
        return pattern, len(_REPETITION.findall(pattern.pattern)), _choices(pattern.pattern)


def _choices(pattern: str) -> int:
    """In how many ways what is optional may be there or not, and one of the options of each group be taken."""
    text = _ONE_CHARACTER.sub("x", pattern).replace("(?:", "(")
    found: int = 1 << text.count("?")
    bars = [0]
    for one in text:
        if one == "(":
            bars.append(0)
        elif one == "|":
            bars[-1] += 1
        elif one == ")":
            found *= 1 + bars.pop()
    return found * (1 + bars[0])
