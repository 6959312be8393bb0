"""/metrics: what the engine counts, in Prometheus' text format.

https://github.com/prometheus/docs/blob/main/docs/instrumenting/exposition_formats.md
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from quire.outputs import Metric
from quire.server.http.models import STATES, ServedModel, ServedModels

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


def metrics_of(models: ServedModels, own: Callable[[Sequence[Metric]], Sequence[Metric]] | None) -> list[Metric]:
    """Those of all engines that are there, each labelled with its model where there are several; those of one name
    together.

    Args:
        own: puts those of one engine under other names.
    """
    families: dict[str, list[Metric]] = {}
    for model in models:
        found = [] if model.engine is None else model.engine.get_metrics()
        for metric in found if own is None else own(found):
            labels = metric.labels if len(models) == 1 else (("model_name", model.name), *metric.labels)
            families.setdefault(metric.name, []).append(metric._replace(labels=labels))
    return [metric for family in families.values() for metric in family]


def state_metrics(models: ServedModels) -> list[Metric]:
    """Of each model, whether it is there or not."""
    text = "1 for what state the model is in."
    return [
        Metric(
            f"{OWN_PREFIX}model_state", "gauge", float(model.state == state), help=text,
            labels=(("model_name", model.name), ("state", state)),
        )
        for model in models
        for state in STATES
    ]  # fmt: skip


class RequestCounts:
    """Requests that were answered: by the API that they were of, by status, and by model where they chose one; and
    lines of batches."""

    def __init__(self) -> None:
        self._found: Counter[tuple[str, str, str]] = Counter()
        self._lines = {"completed": 0, "failed": 0}

    def count(self, door: str, status: int | None, model: ServedModel | None = None) -> None:
        """One more; without a status its client left before the answer."""
        self._found[door, str(status or 499), "" if model is None else model.name] += 1

    def count_line(self, *, is_good: bool) -> None:
        """One more line of a batch has its result."""
        self._lines["completed" if is_good else "failed"] += 1

    def metrics(self) -> list[Metric]:
        """So far."""
        text = "Requests answered, by API and status."
        requests = [
            Metric(f"{OWN_PREFIX}http_requests_total", "counter", count, help=text, labels=_labels(*key))
            for key, count in sorted(self._found.items())
        ]
        text = "Lines of batches that have their results."
        return requests + [
            Metric(f"{OWN_PREFIX}batch_lines_total", "counter", count, help=text, labels=(("status", status),))
            for status, count in self._lines.items()
        ]


def stored_metrics(kinds: Mapping[str, int], num_bytes: int | None) -> list[Metric]:
    """Of what goes on without a connection, and of what is kept.

    Args:
        kinds: how many jobs there are of each kind.
        num_bytes: that the store holds; None: there is none.
    """
    text = "Batches and responses in the background that are worked on."
    found = [
        Metric(f"{OWN_PREFIX}background_jobs", "gauge", count, help=text, labels=(("kind", kind),))
        for kind, count in sorted(kinds.items())
    ]
    if num_bytes is not None:
        found.append(Metric(f"{OWN_PREFIX}store_bytes", "gauge", num_bytes, help="Bytes that the store holds."))
    return found


def _labels(door: str, status: str, model: str) -> tuple[tuple[str, str], ...]:
    return (("door", door), ("status", status), *((("model_name", model),) if model else ()))


def _sample(name: str, labels: Mapping[str, str], value: float) -> str:
    pairs = ",".join(f'{label}="{text.translate(_ESCAPES)}"' for label, text in sorted(labels.items()))
    return f"{name}{{{pairs}}} {float(value)!r}"
