"""Errors travel between processes: what a worker of a pool raises is what its owner catches."""

import copy
import inspect
import pickle
from typing import Any

import pytest

from quire import errors

KINDS = [
    kind
    for kind in vars(errors).values()
    if inspect.isclass(kind) and issubclass(kind, errors.QuireError) and kind.__module__ == errors.__name__
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_can_be_pickled_and_copied(kind: type[errors.QuireError]) -> None:
    options: dict[str, Any] = {"param": "top_p", "field": "model", "retry_after_s": 7}
    arguments = getattr(kind.__init__, "__kwdefaults__", None) or getattr(kind.__init__, "__annotations__", {})
    known = [name for name in options if name in arguments]
    text = "structured_outputs are what it says"  # so that `ShapeError` has nothing to put before it
    error = kind(text, **{name: options[name] for name in known})
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):  # noqa: S301 -- our own bytes
        assert type(again) is kind and str(again) == text
        assert [getattr(again, name) for name in known] == [options[name] for name in known]


def test_all_of_them_were_tried() -> None:
    assert len(KINDS) >= 13
