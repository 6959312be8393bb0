"""Checks of exercise 3.2: expected values of Quire's reference (which tests hold against `transformers`), and draws."""

import math
import random
from collections.abc import Callable
from types import ModuleType
from typing import Any

import array_api_compat.numpy
import numpy as np
from numpy.typing import NDArray

from quire.course.checking import Check, Failed, shown, smallest
from quire.ops.sampling_reference import kept_tokens

TOLERANCE = 1e-6
NUM_DRAWS = 4000
UNLIKELY = 1e-6
"""A chance below which draws are called wrong; the seeds are fixed, so a right sampler passes always."""
Settings = dict[str, Any]


def _expected(logits: NDArray[Any], temperature: float, top_k: int, top_p: float, min_p: float) -> NDArray[Any]:
    exact = logits.astype(np.float64)
    if temperature == 0:
        certain: NDArray[Any] = np.eye(len(exact))[int(np.argmax(exact))]
        return certain
    scaled = (exact - exact.max()) / temperature
    kept = kept_tokens(array_api_compat.numpy, scaled, top_k, top_p, min_p)
    mass = np.where(kept, np.exp(scaled), 0.0)
    probs: NDArray[Any] = mass / mass.sum()
    return probs


def _problem(module: ModuleType, logits: list[float], settings: Settings) -> str | None:
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **settings}
    row = np.array(logits, np.float32)
    kept = row.copy()
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        found = np.asarray(module.probabilities(row, **settings))
    words = ", ".join(f"{name}={value}" for name, value in settings.items())
    call = f"probabilities({[round(one, 4) for one in logits]}{', ' if words else ''}{words})"
    wanted = _expected(kept, **full)
    if not np.array_equal(row, kept):
        return f"{call} changed the logits that it was given"
    if found.shape != wanted.shape or not np.allclose(found, wanted, rtol=0, atol=TOLERANCE):
        return f"{call} gave {shown(np.round(found, 4).tolist())}; expected {shown(np.round(wanted, 4).tolist())}"
    return None


def _hold(module: ModuleType, make: Callable[[random.Random], Settings], scale: float = 2.0, grid: float = 0.0) -> str:
    """Random rows of 2 to 12 logits; the smallest that is wrong is shown. With a grid some logits are equal."""
    rng = random.Random(0)

    def problem(case: tuple[list[float], Settings]) -> str | None:
        return _problem(module, *case)

    def smaller(case: tuple[list[float], Settings]) -> Any:
        logits, settings = case
        for place in range(len(logits) if len(logits) > 1 else 0):
            yield [*logits[:place], *logits[place + 1 :]], settings
        for place, one in enumerate(logits):
            if one != float(round(one)):
                yield [*logits[:place], float(round(one)), *logits[place + 1 :]], settings

    for _ in range(60):
        logits = [rng.gauss(0, scale) for _ in range(rng.randint(2, 12))]
        logits = [float(np.float32(grid * round(one / grid) if grid else one)) for one in logits]
        text = smallest((logits, make(rng)), smaller, problem)
        if text is not None:
            raise Failed(text)
    return "60 random rows"


def softmax(module: ModuleType) -> str:
    """probabilities are softmax of logits / temperature"""
    return _hold(module, lambda rng: {"temperature": rng.choice((0.3, 0.7, 1.0, 1.5))})


def overflow(module: ModuleType) -> str:
    """large logits and small temperatures do not overflow"""
    return _hold(module, lambda rng: {"temperature": rng.choice((1e-4, 0.01, 1.0))}, scale=500.0)


def greedy(module: ModuleType) -> str:
    """temperature 0 is the largest logit, of equals the lowest id"""
    return _hold(module, lambda rng: {"temperature": 0.0}, grid=1.0)


def top_k(module: ModuleType) -> str:
    """top_k keeps exactly k, of equals the lower ids"""
    return _hold(module, lambda rng: {"top_k": rng.randint(1, 6)}, grid=0.5)


def top_p(module: ModuleType) -> str:
    """top_p keeps tokens until their mass reaches it, at least one"""
    return _hold(module, lambda rng: {"top_p": rng.choice((0.01, 0.3, 0.55, 0.83, 0.97))})


def min_p(module: ModuleType) -> str:
    """min_p keeps what is near the most probable"""
    return _hold(module, lambda rng: {"min_p": rng.choice((0.02, 0.1, 0.33, 0.9))})


def together(module: ModuleType) -> str:
    """all at once: temperature, then min_p, top_k, top_p"""

    def make(rng: random.Random) -> Settings:
        return {
            **{"temperature": rng.choice((0.6, 1.3)), "top_k": rng.randint(2, 6)},
            **{"top_p": rng.choice((0.4, 0.7, 0.9)), "min_p": rng.choice((0.0, 0.05, 0.2))},
        }

    return _hold(module, make)


def penalties(module: ModuleType) -> str:
    """penalties: repetition for prompt and output, frequency and presence for the output"""
    logits = np.array([2.0, -1.0, 0.5, 3.0, -2.5, 1.0], np.float32)
    for words, prompt, output, wanted in (
        ({}, [0], [1], [2.0, -1.0, 0.5, 3.0, -2.5, 1.0]),
        ({"repetition_penalty": 2.0}, [0, 0, 1], [], [1.0, -2.0, 0.5, 3.0, -2.5, 1.0]),
        ({"repetition_penalty": 2.0}, [0], [3, 3, 4], [1.0, -1.0, 0.5, 1.5, -5.0, 1.0]),
        ({"presence_penalty": 0.5}, [0], [3, 3, 4], [2.0, -1.0, 0.5, 2.5, -3.0, 1.0]),
        ({"frequency_penalty": 0.5}, [0], [3, 3, 4], [2.0, -1.0, 0.5, 2.0, -3.0, 1.0]),
        (
            {"repetition_penalty": 2.0, "frequency_penalty": 0.25, "presence_penalty": 1.0},
            *([0], [3, 3, 1]),
            [1.0, -3.25, 0.5, 0.0, -2.5, 1.0],
        ),
    ):
        row = logits.copy()
        found = np.asarray(module.penalized(row, list(prompt), list(output), **words))
        call = f"penalized({logits.tolist()}, {prompt}, {output}, {words})"
        if not np.array_equal(row, logits):
            raise Failed(f"{call} changed the logits that it was given")
        if found.shape != logits.shape or not np.allclose(found, wanted, rtol=0, atol=TOLERANCE):
            raise Failed(f"{call} gave {shown(found.tolist())}; expected {wanted}")
    return "6 cases"


def drawn(module: ModuleType) -> str:
    """draws follow the probabilities (chi-square), from rng alone"""
    told = []
    for seed, probs in enumerate(([0.5, 0.25, 0.15, 0.1], [0.02, 0.0, 0.9, 0.08], [0.25, 0.25, 0.0, 0.5])):
        row = np.array(probs)
        tokens = [module.sample(row.copy(), rng) for rng in [np.random.default_rng(seed)] for _ in range(NUM_DRAWS)]
        call = f"sample({probs}, rng), {NUM_DRAWS:,} times,"
        if not all(isinstance(one, int | np.integer) and 0 <= one < len(probs) for one in tokens):
            raise Failed(f"{call} gave {shown(tokens[0])}, expected token ids")
        counts = np.bincount(np.array(tokens), minlength=len(probs))
        if any(count and not chance for count, chance in zip(counts, probs, strict=True)):
            raise Failed(f"{call} drew a token of probability 0: counts {counts.tolist()}")
        likely = row > 0
        square = float(((counts - row * NUM_DRAWS)[likely] ** 2 / (row * NUM_DRAWS)[likely]).sum())
        chance = _chance(square, int(likely.sum()) - 1)
        if chance < UNLIKELY:
            wanted = (row * NUM_DRAWS).round().astype(int).tolist()
            raise Failed(
                f"{call} drew {counts.tolist()}; about {wanted} expected (chi-square {square:.1f}, p = {chance:.0e})"
            )
        rng = np.random.default_rng(seed)
        if [module.sample(row.copy(), rng) for _ in range(50)] != tokens[:50]:
            raise Failed(f"{call} with an rng of the same seed gave other tokens: chance comes from elsewhere")
        told.append(f"{chance:.2f}")
    return f"p = {', '.join(told)}"


def _chance(square: float, freedom: int) -> float:
    """That chi-square is at least so large by chance, for 1 to 3 degrees of freedom."""
    root = math.erfc(math.sqrt(square / 2))
    if freedom == 2:
        return math.exp(-square / 2)
    return root if freedom == 1 else root + math.sqrt(2 * square / math.pi) * math.exp(-square / 2)


CHECKS: tuple[Check, ...] = (softmax, overflow, greedy, top_k, top_p, min_p, together, penalties, drawn)
