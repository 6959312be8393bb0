"""The bar of a long load: on a terminal, after a while, at the bytes that are done."""

import io
import sys
from types import SimpleNamespace
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


def watch(monkeypatch: pytest.MonkeyPatch, *, is_terminal: bool, patience_s: float) -> io.StringIO:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(loading_bar, "DELAY_S", patience_s)
    return stream


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


@pytest.mark.parametrize("is_terminal", [True, False])
def test_nothing_is_shown_where_quiet_was_asked_for(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch, bars: list[Bar]
) -> None:
    written = watch(monkeypatch, is_terminal=is_terminal, patience_s=0.0)
    monkeypatch.setattr(loading_bar, "LINE_S", 0.0)
    with LoadingBar("Calibrating", lines=True, is_quiet=True) as bar:
        bar.show(10, 100)
    assert not bars and not written.getvalue()


@pytest.mark.parametrize(("lines", "is_terminal"), [(True, False), (False, False), (True, True)])
def test_a_log_gets_a_line_at_a_bounded_rate_where_that_was_asked_for(
    lines: bool, is_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = watch(monkeypatch, is_terminal=is_terminal, patience_s=0.0)
    now_s = [100.0]
    monkeypatch.setattr(loading_bar, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    with LoadingBar("Calibrating", lines=lines) as bar:
        for second in range(1, 31):
            now_s[0] = 100.0 + second
            bar.show(second, 40)
    expected = ["25% after 10 s, about 30 s left", "50% after 20 s, about 20 s left", "75% after 30 s, about 10 s left"]
    assert written.getvalue().splitlines() == (
        [f"Calibrating: {line}" for line in expected] if lines and not is_terminal else []
    )
