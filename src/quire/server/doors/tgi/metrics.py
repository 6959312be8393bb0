"""The engine's metrics under TGI's names, for `--metrics-prefix tgi`: those that mean the same.

https://huggingface.co/docs/text-generation-inference/reference/metrics
"""

from collections.abc import Sequence

from quire.outputs import Metric

NAMES = {
    "quire:num_requests_running": "tgi_batch_current_size",
    "quire:num_requests_waiting": "tgi_queue_size",
    "quire:request_success_total": "tgi_request_count",
    "quire:e2e_request_latency_seconds": "tgi_request_duration",
    "quire:request_queue_time_seconds": "tgi_request_queue_duration",
    "quire:request_inference_time_seconds": "tgi_request_inference_duration",
    "quire:request_time_per_output_token_seconds": "tgi_request_mean_time_per_token_duration",
    "quire:request_prompt_tokens": "tgi_request_input_length",
    "quire:request_generation_tokens": "tgi_request_generated_tokens",
}
_FAILED = {("finished_reason", "abort"), ("finished_reason", "error")}


def tgi_metrics(metrics: Sequence[Metric]) -> list[Metric]:
    """Those of `NAMES`; `tgi_request_count` is of the sequences that ended, `tgi_request_success` of those that ended
    well."""
    found = [item._replace(name=NAMES[item.name]) for item in metrics if item.name in NAMES]
    good = [item for item in found if item.name == "tgi_request_count" and _FAILED.isdisjoint(item.labels)]
    return [*found, *(item._replace(name="tgi_request_success", help="Sequences that ended well.") for item in good)]
