"""The one definition of a percentile: of what is observed, simulated and measured."""

import math
from collections.abc import Sequence


def percentile(values: Sequence[float], percent: float) -> float:
    """Of numbers in any order, with straight lines between them, as numpy has it; 0 of none.

    Args:
        percent: from 0 to 100.
    """
    ordered = sorted(values)
    if not ordered:
        return 0.0
    place = percent / 100 * (len(ordered) - 1)
    low = math.floor(place)
    return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])
