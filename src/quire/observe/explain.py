"""Why was this request slow: its phases, which add up, and one sentence that names the largest cause."""

from collections.abc import Callable

from quire.observe.timelines import QUEUE_REASONS, Phase, RequestTimes, Timeline
from quire.outputs import Explanation

_CAUSES = {
    Phase.PREPARING: "went into reading and tokenising the request",
    Phase.QUEUED: "was spent in the queue",
    Phase.PREFILLING: "went into computing its own prompt of {num_prompt_tokens} tokens",
    Phase.DECODING: "went into generating its own {num_output_tokens} tokens",
    Phase.PREEMPTED: "was spent preempted: its cache blocks were given to others ({num_preemptions} times)",
    Phase.WAITING_FOR_PREFILL: "was spent waiting while prompts of other requests in the batch were computed",
    Phase.WAITING_FOR_BLOCKS: "was spent waiting for cache blocks",
    Phase.RECOVERING: "went into restarting the engine's core",
    Phase.DETOKENISING: "went into making text of the last tokens",
    Phase.SENDING: "was spent sending: the reader took the answer slowly",
}
_QUEUE_CAUSES = {
    "no_row": "max_num_seqs requests were running",
    "no_blocks": "the cache had no blocks free",
    "budget": "the steps were full of other prompts (max_num_batched_tokens)",
    "grammar": "its grammar was being compiled",
    "background": "other requests ran, and it was in the background",
}
_ADVICE = {
    "no_row": "more rows (--max-num-seqs) or more machines would shorten it",
    "no_blocks": "a larger cache (--kv-cache-memory-bytes) or a smaller --max-model-len would shorten it",
    "budget": "a larger --max-num-batched-tokens would shorten it",
    "grammar": "a smaller shape, or the same one again, takes less",
    "background": "less traffic beside it would shorten it",
}


def explain(times: RequestTimes, now_s: float, name_of: Callable[[str], str | None]) -> Explanation:
    """Explain a request by the sequence of it that ended last, or that still runs.

    Args:
        times: of one request; it has at least one sequence.
        now_s: stands for the end of a request that has not ended.
        name_of: the public name behind an id of the core.
    """
    slowest = max(times.sequences, key=lambda item: now_s if item.ended_s is None else item.ended_s)
    begin_s = slowest.arrival_s if times.received_s is None else min(times.received_s, slowest.arrival_s)
    parts = list(slowest.seconds)
    parts[Phase.PREPARING] += slowest.arrival_s - begin_s
    if slowest.ended_s is None:
        end_s = max(now_s, slowest.since_s)
        parts[slowest.phase] += end_s - slowest.since_s
    else:
        made_s = max(slowest.ended_s, times.made_s or 0.0)
        end_s = max(made_s, times.sent_s or 0.0)
        parts[Phase.DETOKENISING] += made_s - slowest.ended_s
        parts[Phase.SENDING] += end_s - made_s
    largest = max(Phase, key=lambda part: parts[part])
    waited_for = _by_name(slowest, name_of)
    because = _queue_reasons(slowest)
    return Explanation(
        id=times.request_id,
        caller=times.caller,
        finished=slowest.ended_s is not None,
        finish_reason=slowest.finish_reason,
        sentence=_sentence(slowest, largest, parts[largest], end_s - begin_s, because, waited_for),
        largest=largest.name.lower(),
        total_s=end_s - begin_s,
        parts={part.name.lower(): parts[part] for part in Phase},
        queued_because=because,
        waited_for=waited_for,
        time_to_first_token_s=None if slowest.first_token_s is None else slowest.first_token_s - begin_s,
        num_prompt_tokens=slowest.num_prompt_tokens,
        num_output_tokens=slowest.num_output_tokens,
        num_preemptions=slowest.num_preemptions,
        num_restarts=slowest.num_restarts,
    )


def _queue_reasons(timeline: Timeline) -> dict[str, float]:
    if timeline.first_scheduled_s is None and timeline.ended_s is None:
        return dict(timeline.held_s)
    found = zip(QUEUE_REASONS, timeline.queue_clocks_s, strict=True)
    return {name: seconds for name, seconds in found if seconds > 0} | timeline.held_s


def _by_name(timeline: Timeline, name_of: Callable[[str], str | None]) -> dict[str, float]:
    found: dict[str, float] = {}
    for core_id, seconds in list(timeline.waited_for.items()):  # the engine's thread goes on
        name = name_of(core_id)
        if name is not None:
            found[name] = found.get(name, 0.0) + seconds
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _sentence(
    timeline: Timeline,
    largest: Phase,
    seconds: float,
    total_s: float,
    because: dict[str, float],
    waited_for: dict[str, float],
) -> str:
    share = seconds / total_s if total_s > 0 else 1.0
    text = _CAUSES[largest].format(
        num_prompt_tokens=timeline.num_prompt_tokens,
        num_output_tokens=timeline.num_output_tokens,
        num_preemptions=timeline.num_preemptions,
    )
    text = f"{_duration(seconds)} of {_duration(total_s)} ({share:.0%}) {text}"
    if largest is Phase.QUEUED and because:
        reason = max(because, key=lambda name: because[name])
        if reason in _QUEUE_CAUSES:
            text += f", since {_QUEUE_CAUSES[reason]}; {_ADVICE[reason]}"
        else:
            text += f", since it could not enter before this was ready: {reason.replace('_', ' ')}"
    elif largest in (Phase.WAITING_FOR_PREFILL, Phase.PREEMPTED, Phase.WAITING_FOR_BLOCKS) and waited_for:
        text += f", most of all for {next(iter(waited_for))}"
    if timeline.num_restarts:
        count = "once" if timeline.num_restarts == 1 else f"{timeline.num_restarts} times"
        text += f"; the engine's core was replaced {count} meanwhile"
    return text + "."


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
