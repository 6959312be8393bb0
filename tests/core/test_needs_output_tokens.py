"""With steps in flight, a request whose next step needs its own last token waits for it, and no other request does."""

from dataclasses import replace

import pytest

from quire.core.request import PenaltySpec, SamplingSpec
from tests.core.harness import Harness, alone, new_request


@pytest.mark.parametrize(
    ("spec", "needs"),
    [
        (SamplingSpec(), False),
        (SamplingSpec(logit_bias=((1, 2.0),), min_tokens=3, allowed_token_ids=(1, 2), bad_words=((4,),)), False),
        (SamplingSpec(bad_words=((4,), (4, 5))), True),
        (SamplingSpec(penalties=PenaltySpec(presence=0.5)), True),
        (SamplingSpec(penalties=PenaltySpec(frequency=-0.5)), True),
        (SamplingSpec(penalties=PenaltySpec(repetition=0.9)), True),
    ],
)
def test_which_sampling_needs_them(spec: SamplingSpec, needs: bool) -> None:
    assert spec.needs_output_tokens is needs


def test_the_row_waits_and_not_the_batch() -> None:
    harness = Harness(overlap=True, num_blocks=64, max_num_seqs=8, budget=64)
    names = [str(number) for number in range(8)]
    for name in names:
        harness.add(replace(new_request(name, [int(name), 2, 3], 12), needs_output_tokens=name == "5"))
    scheduled: dict[str, list[int]] = {name: [] for name in names}
    waits: dict[str, int] = dict.fromkeys(names, 0)
    while harness.scheduler.has_work:
        harness.step()
        record = harness.scheduler.last_record
        for item in record.scheduled:
            scheduled[item.request_id].append(record.step_id)
        for stalled in record.stalled:
            assert stalled.reason == "in_flight"
            waits[stalled.request_id] += len(scheduled[stalled.request_id]) < 12
    for name in names:
        steps = scheduled[name]
        assert steps == (list(range(0, 24, 2)) if name == "5" else list(range(12))), name
        assert waits[name] == (11 if name == "5" else 0), "11 of its tokens were waited for"
        assert harness.outputs[name].sequence == alone(harness.outputs[name].new).sequence
