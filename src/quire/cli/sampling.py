"""Which sampling applies, and where each value is from: a flag, the model's generation_config.json, or a default."""

from collections.abc import Mapping
from typing import Any

from quire.outputs import Decision
from quire.sampling_params import FROM_MODEL, GREEDY_EPSILON, SamplingParams

TAILS = ("top_p", "top_k", "min_p")
"""What cuts the improbable tokens off."""
MIN_P = 0.05
"""At a terminal, where nothing else cuts a tail: at temperature 1 some token in a hundred would be noise."""


def check(given: Mapping[str, Any]) -> None:
    """Check flags before a model is loaded for them.

    Raises:
        InvalidRequestError: a value out of range.
    """
    SamplingParams.from_mapping({"max_tokens": None, **given})


def resolve(
    given: Mapping[str, Any], stated: Mapping[str, Any], *, min_p: float | None = None
) -> tuple[dict[str, Any], list[Decision]]:
    """The values that apply, with the reason for each.

    Args:
        given: by flags.
        stated: by the model's generation_config.json.
        min_p: applies where neither of both cuts a tail and sampling is not greedy.
    """
    own = {name: stated[name] for name in FROM_MODEL if name in stated and name not in given}
    values = {**own, **given}
    decisions = [
        Decision("sampling", _shown(found), source)
        for found, source in ((given, "flags"), (own, "generation_config.json"))
        if found
    ]
    left = {"temperature": 1.0} if "temperature" not in values else {}
    if left:
        decisions.append(Decision("sampling", _shown(left), "default: neither a flag nor the model says"))
    if min_p is None or values.get("temperature", 1.0) < GREEDY_EPSILON or any(name in values for name in TAILS):
        return values, decisions
    why = f"default: the model states no {', '.join(TAILS)}; --min-p 0 keeps all tokens"
    return {**values, "min_p": min_p}, [*decisions, Decision("sampling", _shown({"min_p": min_p}), why)]


def _shown(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value!r}" for name, value in values.items())
