"""Losses against torch in float64, windows against their definition, and the tables as others read them."""

import json
import statistics
from collections.abc import Iterator, Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from quire.bench.eval_loss import Forced, Loss, measure_losses
from quire.bench.eval_report import Row, Table, as_json, as_text
from quire.bench.eval_svg import draw
from quire.bench.eval_text import MAX_TEXT_BYTES, OF_EMBEDDED, PACKAGED, Window, read_text, windows_of
from quire.bench.turns import take_turns
from quire.errors import ConfigurationError, RequestFailedError

VOCABULARY = 500
TEXT = np.random.default_rng(3).permutation(VOCABULARY)[:300].tolist()


def model(seed: int, rows: int = 7, width: int = VOCABULARY) -> Forced:
    """Random logits, much like those of other seeds, and the same of a place in the text however it is cut."""
    shared, own = (np.random.default_rng(one).normal(0, 1, (len(TEXT), width)) for one in (0, seed))
    table = (3 * shared + own).astype(np.float32)

    def read(token_ids: Sequence[int], first: int) -> Iterator[Any]:
        begin = TEXT.index(token_ids[0])
        for start in range(first, len(token_ids) - 1, rows):
            yield table[begin + start : begin + min(start + rows, len(token_ids) - 1)]

    return read


def whole(one: Forced) -> Any:
    return torch.from_numpy(np.concatenate(list(one(TEXT, 0))))


def quiet(done: int, total: int) -> None:
    assert 0 < done <= total


def test_losses_are_those_of_torch_in_float64() -> None:
    exact, other = model(1), model(2)
    mine, found = measure_losses(exact, [other], [Window(TEXT, 0)], quiet)
    reference, logits = (torch.log_softmax(whole(one).double(), -1) for one in (exact, other))
    targets = torch.tensor(TEXT[1:])
    for loss, log_probs in ((mine, reference), (found, logits)):
        assert loss.perplexity == pytest.approx(
            float(torch.nn.functional.nll_loss(log_probs, targets).exp()), rel=1e-12
        )
        kl = torch.nn.functional.kl_div(log_probs, reference, reduction="none", log_target=True).sum(-1)
        assert loss.mean_kl == pytest.approx(float(kl.mean()), rel=1e-12, abs=1e-15)
        assert loss.p99_kl == pytest.approx(float(torch.quantile(kl, 0.99)), rel=1e-12, abs=1e-15)
        same = (log_probs.argmax(-1) == reference.argmax(-1)).double().mean()
        assert loss.agreement == pytest.approx(float(same), rel=1e-12)
    assert (mine.mean_kl, mine.p99_kl, mine.agreement) == (0.0, 0.0, 1.0)
    assert 0.2 < found.agreement < 0.9 and found.num_tokens == len(TEXT) - 1


def test_how_the_text_comes_in_pieces_changes_nothing() -> None:
    figures = []
    for rows in (1, 64, 1000):
        _, loss = measure_losses(model(1, rows), [model(2, rows)], [Window(TEXT[:150], 0), Window(TEXT[:], 149)], quiet)
        figures.append((np.concatenate(loss.nll).tolist(), np.concatenate(loss.kl).tolist()))
    assert figures[0] == figures[1] == figures[2] and len(figures[0][0]) == len(TEXT) - 1


def test_what_cannot_be_compared_is_refused() -> None:
    def broken(token_ids: Sequence[int], first: int) -> Iterator[Any]:
        for chunk in model(1)(token_ids, first):
            yield np.where(np.arange(VOCABULARY) == 3, np.float32("nan"), chunk)

    with pytest.raises(RequestFailedError, match="not finite"):
        measure_losses(model(1), [broken], [Window(TEXT, 0)], quiet)
    with pytest.raises(RequestFailedError, match="500 and 501 tokens"):
        measure_losses(model(1), [model(1, width=501)], [Window(TEXT, 0)], quiet)


@pytest.mark.parametrize("prefix", [[], [-1], [-1, -2]])
@pytest.mark.parametrize(("context", "stride"), [(64, 62), (64, 20), (64, 1), (301, 299), (302, 5), (512, 3)])
def test_each_token_is_predicted_once_after_all_that_fits(prefix: list[int], context: int, stride: int) -> None:
    text = list(range(300))
    predicted = []
    for window in windows_of(text, context, stride, prefix):
        tokens = list(window.token_ids)
        assert len(tokens) <= context and tokens[: len(prefix)] == prefix
        own = tokens[len(prefix) :]
        assert own == text[own[0] : own[0] + len(own)] and own[0] % stride == 0
        predicted += tokens[window.first + 1 :]
        assert window.num_predicted == len(tokens[window.first + 1 :]) > 0
    left_out = [] if prefix else [0]  # nothing stands before it
    room = context - len(prefix)
    assert predicted == [token for token in text if token not in left_out] or stride == room
    assert len(set(predicted)) == len(predicted)
    if not prefix and stride == room:  # nor before the first of contexts that do not overlap
        assert set(text) - set(predicted) == set(range(0, 300, stride))


@pytest.mark.parametrize(
    ("length", "context", "stride", "words"),
    [(100, 64, 64, "too short: 98"), (0, 64, 64, "too short: 0"), (500, 64, 65, "from 1 to 64"), (500, 1, 1, "stride")],
)
def test_too_short_or_cut_amiss(length: int, context: int, stride: int, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        windows_of(list(range(length)), context, stride)


def test_texts(tmp_path: Any) -> None:
    for packaged in (PACKAGED, OF_EMBEDDED):
        assert 10_000 < len(read_text(packaged)) < 20_000
    file = tmp_path / "text"
    for content, words in ((b" \n", "is empty"), (b"a\xff", "byte 1"), (b"a" * (MAX_TEXT_BYTES + 1), "16 MiB")):
        file.write_bytes(content)
        with pytest.raises(ConfigurationError, match=words) as raised:
            read_text(file)
        assert raised.value.field == "text"
    for path, words in ((tmp_path, "directory"), (tmp_path / "none", "no such file")):
        with pytest.raises(ConfigurationError, match=words):
            read_text(path)


def loss_of(nll: float, kl: float) -> Loss:
    return Loss([np.full(100, nll)], [np.full(100, kl)], [np.arange(100) < 75])


TABLE = Table(
    "a <model>", "it in float32", loss_of(1.0, 0.0), "a text", notes=["read this & that"],
    rows=[
        Row("none", 4 << 20, loss_of(1.0, 1e-5), {"W1": [10.0, 12.0, 8.0]}),
        Row("int8", 2 << 20, loss_of(1.1, 0.01), {"W1": [20.0, 18.0, 24.0]}),
    ],
)  # fmt: skip


def test_the_table_as_text_and_for_programs() -> None:
    text = as_text(TABLE)
    head, none, int8 = text.splitlines()[4:7]
    assert head.split() == "format memory W1 tok/s speed perplexity change KL mean KL p99 same".split()
    assert none.split()[:4] == ["none", "4.0", "MiB", "100%"]
    # Medians of 20, 18, 24 and of 20/10, 18/12, 24/8.
    assert int8.split()[1:12] == "2.0 MiB 50% 20.0 (18.0 to 24.0) 2.00 x (1.50 to".split()
    assert int8.split()[-5:] == [f"{np.e**1.1:.3f}", f"{np.e**0.1 - 1:+.2%}", "1.0e-02", "1.0e-02", "75.0%"]
    assert "read this & that" in text
    row = json.loads(json.dumps(as_json([TABLE], {"cores": "2"})))["tables"][0]["rows"][1]
    assert row["speed"]["W1"]["output_tokens_per_second"] == [20.0, 18.0, 24.0]
    assert (row["speed"]["W1"]["speedup"], row["memory_ratio"]) == (statistics.median([2.0, 1.5, 3.0]), 0.5)


def test_the_drawing_is_svg_and_readable_in_the_dark() -> None:
    text = draw([TABLE, TABLE], ["how & where"])
    root = ElementTree.fromstring(text)
    name = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{name}svg" and "prefers-color-scheme:dark" in text
    shown = [item.text for item in root.iter(f"{name}text")]
    assert (
        shown.count("a <model>") == 2
        and "2.00 x" in shown
        and "read this & that" in shown
        and shown[-1] == "how & where"
    )
    bars = [float(bar.get("width", "")) for bar in root.iter(f"{name}rect") if bar.get("class") == "bar"]
    assert bars == [90, 45, 45, 90] * 2  # memory and speed of one row, then of the other, in each table


def test_turns() -> None:
    order: list[str] = []

    def engine(name: str) -> Any:
        return lambda items: (order.append(f"{name}{items[0].prompt_token_ids[0]}"), (2.0, None))[1]

    runs = take_turns({"a": engine("a"), "b": engine("b")}, "W1", 3, 1000, lambda run: None)
    assert [run.engine for run in runs] == ["a", "b", "b", "a", "a", "b"]
    assert len({name[1:] for name in order}) == 3, "each repetition has ids of its own, the same for all engines"
    assert {run.output_tokens_per_second for run in runs} == {64.0}
