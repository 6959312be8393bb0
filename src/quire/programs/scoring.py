"""How likely each of some texts is after another text, from the log-probabilities of tokens.

The whole text is tokenised with each option: where an option's first characters join the token before them ("1" after
" "), the tokens are those that the model knows the text by. What all of these and the text before have in common is the
start; an option is the tokens after the start, and its score their mean log-probability.

::

    start ── yes ──────────── "yes"        yes | no | no, but: a tree. "no" is a beginning of "no, but", so it stands
          └─ no ─┬─ , ─ but   "no, but"    for every text that goes on in another way: its last factor is
                 └─ other     "no"         1 - p("," | "no"), which counts as one more token of it.

Every inner node of the tree is one request for one token, with the log-probabilities of the node's children: the
prompts are beginnings of one another and come from the prefix cache.
"""

import math
from collections.abc import Mapping, Sequence

from quire.errors import InvalidRequestError

Path = tuple[int, ...]
Tree = dict[Path, list[int]]
"""The tokens of an inner node -> the tokens that may follow."""
Likelihoods = Mapping[tuple[Path, int], float]
"""(Node, token) -> the token's log-probability there."""


def common_length(paths: Sequence[Path]) -> int:
    """Tokens that all begin with."""
    shortest, longest = min(paths), max(paths)
    return next((at for at, pair in enumerate(zip(shortest, longest, strict=False)) if len({*pair}) > 1), len(shortest))


def tree_of(paths: Sequence[Path], start: int) -> Tree:
    """The inner nodes from the start on.

    Raises:
        InvalidRequestError: the options have the same tokens, or nothing stands before them.
    """
    if start == 0:
        raise InvalidRequestError("some text must stand before the options: the first token has no probability")
    if len({*paths}) < len(paths) or any(len(path) <= start for path in paths):
        raise InvalidRequestError("two options have the same tokens")
    tree: Tree = {}
    for path in paths:
        for end in range(start, len(path)):
            following = tree.setdefault(path[:end], [])
            if path[end] not in following:
                following.append(path[end])
    return tree


def score(path: Path, start: int, tree: Tree, likelihoods: Likelihoods) -> float:
    """The mean log-probability of an option's tokens; see above."""
    found = [likelihoods[path[:end], path[end]] for end in range(start, len(path))]
    if path in tree:
        goes_on = math.fsum(math.exp(likelihoods[path, token]) for token in tree[path])
        found.append(math.log1p(-min(goes_on, 1.0 - 2.0**-53)))
    return math.fsum(found) / len(found)
