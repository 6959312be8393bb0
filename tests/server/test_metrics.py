"""/metrics, read by Prometheus' own parser."""

import random
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from quire.outputs import Metric
from quire.server.http.metrics import render_metrics


def families(metrics: list[Metric], model_name: str = "m", prefix: str = "quire") -> dict[str, Any]:
    text = render_metrics(metrics, model_name, prefix).decode()
    found = list(text_string_to_metric_families(text))
    assert len({family.name for family in found}) == len(found) == text.count("# HELP ") == text.count("# TYPE ")
    return {family.name: family for family in found}


def test_every_kind_is_read_back_as_it_was() -> None:
    found = families([
        Metric("quire:num_requests_running", "gauge", 2, help="Requests that hold a row."),
        Metric("quire:generation_tokens_total", "counter", 7e15, help="Tokens."),
        Metric("quire:request_success_total", "counter", 3, help="Ended.", labels=(("finished_reason", "stop"),)),
        Metric("quire:request_success_total", "counter", 4, help="Ended.", labels=(("finished_reason", "abort"),)),
        Metric("quire:time_to_first_token_seconds", "histogram", 3, 1.5, ((0.5, 1), (1.0, 2)), "TTFT."),
    ], prefix="vllm")  # fmt: skip
    base = {"model_name": "m", "engine": "0"}
    kinds = {name: (family.type, family.documentation) for name, family in found.items()}
    assert kinds == {
        "vllm:num_requests_running": ("gauge", "Requests that hold a row."),
        "vllm:generation_tokens": ("counter", "Tokens."), "vllm:request_success": ("counter", "Ended."),
        "vllm:time_to_first_token_seconds": ("histogram", "TTFT."),
    }  # fmt: skip
    samples = [(item.name, item.labels, item.value) for family in found.values() for item in family.samples]
    seconds = "vllm:time_to_first_token_seconds"
    assert samples == [
        ("vllm:num_requests_running", base, 2.0),
        ("vllm:generation_tokens_total", base, 7e15),
        ("vllm:request_success_total", {**base, "finished_reason": "stop"}, 3.0),
        ("vllm:request_success_total", {**base, "finished_reason": "abort"}, 4.0),
        (f"{seconds}_bucket", {**base, "le": "0.5"}, 1.0), (f"{seconds}_bucket", {**base, "le": "1"}, 2.0),
        (f"{seconds}_bucket", {**base, "le": "+Inf"}, 3.0), (f"{seconds}_count", base, 3.0),
        (f"{seconds}_sum", base, 1.5),
    ]  # fmt: skip


def test_labels_and_help_may_hold_anything() -> None:
    dice = random.Random(5)
    for _ in range(200):
        name, text, label = ("".join(dice.choices('ab"\\\n{}=, #é', k=dice.randint(1, 8))) for _ in range(3))
        (family,) = families(
            [Metric("quire:x", "gauge", 1.25, help=f"a{text}b", labels=(("l", label),))], name
        ).values()
        (sample,) = family.samples
        assert (sample.labels, sample.value) == ({"model_name": name, "engine": "0", "l": label}, 1.25)
        assert family.documentation == f"a{text}b"
