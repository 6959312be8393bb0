from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def penalized(
    logits: NDArray[Any],
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
) -> NDArray[np.float64]:
    found = np.array(logits, np.float64)
    seen = sorted({*prompt_ids, *output_ids})
    found[seen] = np.where(found[seen] > 0, found[seen] / repetition_penalty, found[seen] * repetition_penalty)
    counts = np.bincount(np.array(output_ids, np.int64), minlength=len(found))
    return found - frequency_penalty * counts - presence_penalty * (counts > 0)


def probabilities(
    logits: NDArray[Any], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> NDArray[np.float64]:
    exact = np.array(logits, np.float64)
    if temperature == 0:
        return np.eye(len(exact))[np.argmax(exact)]
    mass = np.exp((exact - exact.max()) / temperature)
    mass[mass < min_p * mass.max()] = 0
    order = np.argsort(-mass, kind="stable")
    if top_k:
        mass[order[top_k:]] = 0
    ranked = mass[order]
    before = np.cumsum(ranked) - ranked
    cut = before >= top_p * mass.sum()
    cut[0] = False
    mass[order[cut]] = 0
    return mass / mass.sum()


def sample(probs: NDArray[np.float64], rng: np.random.Generator) -> int:
    sums = np.cumsum(probs)
    return int(np.searchsorted(sums, rng.random() * sums[-1], side="right"))
