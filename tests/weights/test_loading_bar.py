"""The bar of a long load: on a terminal, after a while, at the bytes that are done."""

import io
import sys
from typing import Any

import pytest

from quire.weights import loading_bar
from quire.weights.loading_bar import LoadingBar


class Bar:
    """Stands for tqdm's."""

    made: list["Bar"]

    def __init__(self, total: int, **_: Any) -> None:
        self.total, self.n, self.closed = total, 0, False
        self.made.append(self)

    def update(self, step: int) -> None:
        self.n += step

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Bar]:
    Bar.made = []
    monkeypatch.setattr("tqdm.tqdm", Bar)
    return Bar.made


def watch(monkeypatch: pytest.MonkeyPatch, *, is_terminal: bool, patience_s: float) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(loading_bar, "DELAY_S", patience_s)


def test_it_stands_at_the_bytes_that_are_done(monkeypatch: pytest.MonkeyPatch, bars: list[Bar]) -> None:
    watch(monkeypatch, is_terminal=True, patience_s=0.0)
    with LoadingBar() as bar:
        for done in (10, 30, 100):
            bar.show(done, 100)
            assert (bars[0].n, bars[0].total) == (done, 100)
    assert len(bars) == 1 and bars[0].closed


@pytest.mark.parametrize(("is_terminal", "patience_s"), [(False, 0.0), (True, 1e9)])
def test_nothing_is_shown_where_no_terminal_is_or_where_loading_is_short(
    is_terminal: bool, patience_s: float, monkeypatch: pytest.MonkeyPatch, bars: list[Bar]
) -> None:
    watch(monkeypatch, is_terminal=is_terminal, patience_s=patience_s)
    with LoadingBar() as bar:
        bar.show(10, 100)
    assert not bars
