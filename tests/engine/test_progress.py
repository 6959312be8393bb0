"""The progress bar: one tick a prompt, and tokens of all prompts so far."""

from typing import Any

import pytest

from quire.llm import progress_bar
from quire.outputs import CompletionOutput, RequestOutput


class Bar:
    """As much of tqdm's as is used."""

    made: list["Bar"]

    def __init__(self, *, total: int, **_: Any) -> None:
        self.total, self.num_ticks, self.texts, self.is_closed = total, 0, list[str](), False
        self.made.append(self)

    def set_postfix_str(self, text: str, *, refresh: bool) -> None:
        self.texts.append(text)

    def update(self, count: int) -> None:
        self.num_ticks += count

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: Any) -> None:
        self.is_closed = True


def output(num_prompt: int, *num_tokens: int) -> RequestOutput:
    choices = [CompletionOutput(index, "", [1] * count) for index, count in enumerate(num_tokens)]
    return RequestOutput("r", None, [1] * num_prompt, choices, finished=True)


@pytest.mark.parametrize("show", [True, False])
def test_it_ticks_for_each_prompt_and_sums_up_their_tokens(monkeypatch: pytest.MonkeyPatch, show: bool) -> None:
    """The two rates have one time below them: their ratio is that of the tokens."""
    kind = type("Made", (Bar,), {"made": []})
    monkeypatch.setattr("tqdm.auto.tqdm", kind)
    monkeypatch.setattr("time.monotonic", iter([100.0, 101.0, 104.0]).__next__)
    with progress_bar(2, show=show) as advance:
        advance(output(30, 4, 6))
        advance(output(10, 10))
    if not show:
        assert kind.made == []
        return
    (bar,) = kind.made
    assert (bar.total, bar.num_ticks, bar.is_closed) == (2, 2, True)
    assert bar.texts == ["in 30.0 tok/s, out 10.0 tok/s", "in 10.0 tok/s, out 5.0 tok/s"]
