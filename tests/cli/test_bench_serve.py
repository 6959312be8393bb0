"""`quire bench serve` and `quire bench compare`: numpy is the judge of the figures, a server of what is sent."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from quire.bench import serving
from quire.bench.compare import compare
from quire.bench.serving import Chunk, Load, Seen
from quire.cli.bench_dataset import sharegpt_loads
from quire.cli.bench_serve import ENDPOINTS
from quire.cli.main import main, make_parser
from quire.errors import ConfigurationError
from quire.llm import AsyncLLM
from quire.observe.arrivals import SHAREGPT, made_up
from tests.server.conftest import Running, start

VLLM_NAMES = """
date backend label model_id tokenizer_id num_prompts request_rate burstiness max_concurrency duration
completed failed total_input_tokens total_output_tokens request_throughput request_goodput output_throughput
total_token_throughput input_lens output_lens ttfts itls generated_texts errors mean_ttft_ms median_ttft_ms
std_ttft_ms p99_ttft_ms mean_tpot_ms median_tpot_ms std_tpot_ms p99_tpot_ms mean_itl_ms median_itl_ms
std_itl_ms p99_itl_ms latencies start_times max_output_tokens_per_s max_concurrent_requests
""".split()
"""Of a result of `vllm bench serve --save-result --save-detailed`, version 0.32."""


@pytest.fixture(scope="module")
def served(tiny: Path) -> Iterator[Running]:
    instance = start(AsyncLLM(str(tiny), max_num_seqs=8), api_key=["key"])
    yield instance
    instance.stop()
    instance.engine.close()


def seen(rng: np.random.Generator, count: int, slower: float = 1.0) -> list[Seen]:
    found = []
    for _ in range(count):
        gaps = slower * rng.gamma(4.0, 0.01, size=rng.integers(2, 30))
        one = Seen(Load("", 5, len(gaps)), sent_s=float(rng.random()), num_prompt=5, num_output=len(gaps))
        one.chunks_s = [float(value) for value in one.sent_s + np.cumsum(gaps)]
        found.append(one)
    return found


def test_the_figures_are_those_of_numpy() -> None:
    runs = seen(np.random.default_rng(0), 50)
    failed = Seen(Load("", 5, 5), error="OverloadedError: full")
    found = serving.result([*runs, failed], 7.0, [90, 99], {"ttft": 40.0}, {})
    ttft = np.array([one.chunks_s[0] - one.sent_s for one in runs])
    tpot = np.array([(one.chunks_s[-1] - one.chunks_s[0]) / (len(one.chunks_s) - 1) for one in runs])
    itl = np.concatenate([np.diff(one.chunks_s) for one in runs])
    e2el = np.array([one.chunks_s[-1] - one.sent_s for one in runs])
    for name, values in {"ttft": ttft, "tpot": tpot, "itl": itl, "e2el": e2el}.items():
        assert found[f"mean_{name}_ms"] == pytest.approx(values.mean() * 1e3)
        assert found[f"std_{name}_ms"] == pytest.approx(values.std() * 1e3)
        assert found[f"median_{name}_ms"] == pytest.approx(np.median(values) * 1e3)
        for percent in (90, 99):
            assert found[f"p{percent}_{name}_ms"] == pytest.approx(np.percentile(values, percent) * 1e3)
    assert (found["completed"], found["failed"]) == (50, 1)
    assert found["request_goodput"] == pytest.approx((ttft <= 0.04).sum() / 7.0)
    assert found["output_throughput"] == pytest.approx(sum(len(one.chunks_s) for one in runs) / 7.0)
    assert found["errors"][-1] == "OverloadedError: full" and found["ttfts"][-1] == 0.0
    assert found["latencies"] == pytest.approx([*e2el, 0.0])
    begun = min(one.sent_s for one in runs)
    assert found["start_times"][:-1] == [one.sent_s for one in runs]
    chunks = np.concatenate([one.chunks_s for one in runs]) - begun
    assert found["max_output_tokens_per_s"] == np.bincount(chunks.astype(int)).max()
    spans = [(int(one.sent_s - begun), int(one.chunks_s[-1] - begun)) for one in runs]
    assert found["max_concurrent_requests"] == max(
        sum(first <= second <= last for first, last in spans) for second in range(10)
    )


@pytest.mark.parametrize(("burstiness", "spread"), [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5)])
def test_arrivals_have_their_rate_and_their_burstiness(burstiness: float, spread: float) -> None:
    """Gaps of a Gamma distribution with shape k have a coefficient of variation of 1 / sqrt(k)."""
    gaps = np.diff(serving.arrival_times(20_000, 8.0, burstiness, seed=1))
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(spread, rel=0.05)
    assert serving.arrival_times(3, math.inf, 1.0, 0) == [0.0, 0.0, 0.0]


def test_no_more_are_open_than_asked_for() -> None:
    open_now, most = 0, 0

    def ask(load: Load) -> Iterator[Chunk]:
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)
        yield Chunk("a")
        yield Chunk("", 3, 1)
        open_now -= 1

    found, _ = serving.run([Load("x", 1, 1)] * 30, [0.0] * 30, ask, 1)
    assert most == 1 and all(one.error is None and one.num_prompt == 3 for one in found)


def test_lengths() -> None:
    loads = serving.random_loads(200, 100, 50, 0.2, 7, 0, as_text=False)
    assert {len(one.prompt) for one in loads} <= set(range(87, 128)) and len({len(one.prompt) for one in loads}) > 20
    assert all(one.prompt[:7] == loads[0].prompt[:7] for one in loads)
    assert all(40 <= one.num_output <= 60 for one in loads)
    shaped = sharegpt_loads(2000, 2048, 0, as_text=False)
    assert all(one.num_prompt + one.num_output <= 2048 for one in shaped)
    assert np.mean([one.num_prompt for one in shaped]) == pytest.approx(161, rel=0.25)
    simulated = made_up(SHAREGPT, 2000, math.inf, 2048, 0)
    assert [(one.num_prompt, one.num_output) for one in shaped] == [(one.prompt, one.num_output) for one in simulated]
    assert {len(one.prompt.split()) - one.num_prompt for one in sharegpt_loads(9, 64, 1, as_text=True)} == {0}


def test_the_defaults_are_vllms() -> None:
    """Of `vllm bench serve` and `vllm bench throughput`, version 0.32."""
    for kind in ("serve", "throughput"):
        options = make_parser(["bench", kind]).parse_args(["bench", kind])
        assert options.num_prompts == 1000
    options = make_parser(["bench", "serve"]).parse_args(["bench", "serve"])
    assert (options.random_input_len, options.random_output_len, options.random_range_ratio) == (1024, 128, 0.0)
    assert (options.dataset_name, options.request_rate, options.burstiness) == ("random", math.inf, 1.0)


def test_two_results_are_told_apart_where_they_differ() -> None:
    rng = np.random.default_rng(1)
    first, same, slower = (serving.result(seen(rng, 200, factor), 5.0, [99], {}, {}) for factor in (1.0, 1.0, 1.5))
    assert not any(one.is_certain for one in compare(first, same) if "median" in one.name)
    found = {one.name: one for one in compare(first, slower)}
    assert found["TPOT mean ms"].is_certain and found["TPOT mean ms"].ratio == pytest.approx(1.5, rel=0.1)
    assert found["TPOT mean ms"].low < found["TPOT mean ms"].ratio < found["TPOT mean ms"].high
    with pytest.raises(ConfigurationError, match="save-detailed"):
        compare(first, {"output_throughput": 1.0})


def ended(served: Running) -> float:
    metrics = served.engine.get_metrics()
    return sum(one.value for one in metrics if one.name == "quire:request_success_total")


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_a_server_is_measured(
    served: Running, backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = tmp_path / "requests.jsonl"
    lines.write_text("".join(json.dumps({"prompt": f"hello {i}", "output_tokens": 3 + i}) + "\n" for i in range(6)))
    words = ["bench", "serve", "--base-url", served.url, "--api-key", "key", "--backend", backend, "--disable-tqdm"]
    words += ["--dataset-name", "custom", "--dataset-path", str(lines), "--save-result", "--save-detailed"]
    words += ["--label", "a try", "--num-warmups", "2", "--endpoint", ENDPOINTS[backend]]
    paths = [str(tmp_path / name) for name in ("a.json", "b.json")]
    before = ended(served)
    for path in paths:
        assert main([*words, "--result-filename", path]) == 0, capsys.readouterr()
    assert ended(served) - before == 2 * (2 + 6)
    found = json.loads(Path(paths[0]).read_text())
    assert {*VLLM_NAMES} <= found.keys() and found["label"] == "a try"
    assert (found["dataset_name"], found["dataset_path"], found["seed"]) == ("custom", str(lines), 0)
    assert found["output_lens"] == [3 + i for i in range(6)] and found["errors"] == [""] * 6
    assert all(len(gaps) < count for gaps, count in zip(found["itls"], found["output_lens"], strict=True))
    assert main(["bench", "compare", *paths, "--json"]) == 0
    assert "TTFT mean ms" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--num-prompts", "0"], "num_prompts must be between 1 and"),
        (["--num-warmups", "-1"], "num_warmups must be between 0 and"),
        (["--endpoint", "v1"], "endpoint must begin with /"),
        (["--request-rate", "0"], "request_rate must be above 0"),
        (["--goodput", "ttft"], "goodput must be ttft:MS"),
        (["--goodput", "itl:3"], "goodput must be ttft:MS"),
        (["--metric-percentiles", "99,x"], "metric_percentiles must be numbers"),
        (["--percentile-metrics", "ttfx"], "percentile_metrics must be of"),
        (["--dataset-name", "custom"], "dataset_path goes with"),
        (["--dataset-name", "sharegpt"], "the texts of sharegpt are not here; sharegpt-lengths: random"),
        (["--random-range-ratio", "1"], "random_range_ratio"),
        (["--base-url", "http://127.0.0.1:9"], "no answer from 127.0.0.1:9"),
    ],
)
def test_bad_words_are_named(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", *words]) != 0
    assert said in capsys.readouterr().err


def test_a_file_of_requests_that_is_no_text_is_named(
    served: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "requests.jsonl").write_bytes(b"\xff\n")
    words = ["bench", "serve", "--base-url", served.url, "--api-key", "key", "--dataset-name", "custom"]
    assert main([*words, "--dataset-path", str(tmp_path / "requests.jsonl")]) == 2
    assert "requests.jsonl is not UTF-8 text" in capsys.readouterr().err
