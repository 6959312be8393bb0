"""The one definition of a percentile, against numpy's."""

import random

import numpy as np
import pytest

from quire.engine.percentiles import percentile


@pytest.mark.parametrize("count", [1, 2, 3, 4, 100, 201])
def test_percentiles_are_numpys(count: int) -> None:
    chance = random.Random(count)
    values = [chance.lognormvariate(0, 2) for _ in range(count)]
    for percent in (0, 1, 2.5, 25, 50, 51, 90, 99, 99.9, 100):
        assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_of_no_numbers_it_is_zero() -> None:
    assert percentile([], 50) == 0.0
