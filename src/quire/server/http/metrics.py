"""/metrics: what the engine counts, in Prometheus' text format.

https://github.com/prometheus/docs/blob/main/docs/instrumenting/exposition_formats.md
"""

from collections import Counter
from collections.abc import Iterable, Mapping

from quire.outputs import Metric

CONTENT_TYPE = "text/plain; version=1.0.0; charset=utf-8"
OWN_PREFIX = "quire:"
_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})


def render_metrics(metrics: Iterable[Metric], model_name: str, prefix: str) -> bytes:
    """The body of a scrape: one family for each name, labelled with the model's name and, as vLLM does, the engine's
    number.

    Args:
        metrics: those of one name stand together.
        prefix: stands before the colon of each name; empty: names stay as they are.
    """
    lines: list[str] = []
    last = ""
    for metric in metrics:
        name = f"{prefix}:{metric.name.removeprefix(OWN_PREFIX)}" if prefix else metric.name
        labels = {"model_name": model_name, "engine": "0", **dict(metric.labels)}
        if name != last:
            text = metric.help.replace("\\", r"\\").replace("\n", r"\n")
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {metric.kind}"]
            last = name
        if metric.kind == "histogram":
            buckets = [(f"{bound:g}", count) for bound, count in metric.buckets]
            for bound, count in [*buckets, ("+Inf", metric.value)]:
                lines.append(_sample(f"{name}_bucket", {**labels, "le": bound}, count))
            lines += [_sample(f"{name}_count", labels, metric.value), _sample(f"{name}_sum", labels, metric.total)]
        else:
            lines.append(_sample(name, labels, metric.value))
    return "".join(f"{line}\n" for line in lines).encode()


class RequestCounts:
    """Requests that were answered: by the API that they were of, and by status."""

    def __init__(self) -> None:
        self._found: Counter[tuple[str, str]] = Counter()

    def count(self, door: str, status: int | None) -> None:
        """One more; without a status its client left before the answer."""
        self._found[door, str(status or 499)] += 1

    def metrics(self) -> list[Metric]:
        """So far."""
        text = "Requests answered, by API and status."
        return [
            Metric(f"{OWN_PREFIX}http_requests_total", "counter", count, help=text, labels=_labels(door, status))
            for (door, status), count in sorted(self._found.items())
        ]


def _labels(door: str, status: str) -> tuple[tuple[str, str], ...]:
    return (("door", door), ("status", status))


def _sample(name: str, labels: Mapping[str, str], value: float) -> str:
    pairs = ",".join(f'{label}="{text.translate(_ESCAPES)}"' for label, text in sorted(labels.items()))
    return f"{name}{{{pairs}}} {float(value)!r}"
