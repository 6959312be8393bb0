"""A recording holds all that a scheduler decides by, and none of what was said."""

import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quire.core.policy import make_policy
from quire.core.prefix_cache import NullPrefixCache, PrefixCache
from quire.core.request import NewRequest, Request, SamplingSpec
from quire.errors import ConfigurationError, ShapeError
from quire.observe import recording
from quire.observe.recording import RecordedScheduler
from quire.observe.replay import replay
from tests.core.harness import Harness


class Moody:
    """A rule that lets a request in at some time, or fails."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def ready(self, request: Request) -> str | None:
        if self.rng.random() < 0.02:
            raise ShapeError("cannot be compiled")
        return "mood" if self.rng.random() < 0.3 else None


def storm(path: Path, seed: int, steps: int = 120) -> Harness:
    """Requests that share beginnings, fail, are preempted, held and dropped, on a scheduler that is recorded."""
    rng = random.Random(seed)
    policy, has_cache = rng.choice(["fcfs", "priority"]), rng.random() < 0.8
    harness = Harness(
        num_blocks=rng.choice([8, 12, 24]),
        block_size=rng.choice([1, 2, 4]),
        max_model_len=8,
        max_num_seqs=rng.choice([2, 4]),
        budget=rng.choice([3, 8, 64]),
        overlap=rng.random() < 0.5,
        vocab_size=5,
        fails=lambda request_id, position: request_id.endswith("!") and position == 3,
    )
    rules = [Moody(rng)] if rng.random() < 0.5 else []
    cache = PrefixCache(bytes(32)) if has_cache else NullPrefixCache()
    harness.scheduler = RecordedScheduler(
        str(path), harness.scheduler.config, make_policy(policy), cache, rules, policy_name=policy
    )
    for step in range(steps):
        if rng.random() < 0.5 and step < steps - 20:
            harness.add(asked(f"{step}{'!' if rng.random() < 0.1 else ''}", rng))
        if rng.random() < 0.1 and harness.outputs:
            harness.abort(rng.choice([*harness.outputs]))
        if harness.scheduler.has_work:
            harness._emit(plain_step(harness))
        elif rng.random() < 0.5:
            harness.executor.give_back(harness.scheduler.give_back(keeps_cached=rng.random() < 0.5))
    harness.scheduler._file.flush()
    return harness


def plain_step(harness: Harness) -> Any:
    """One step. The harness's own checks are about rules that these storms break."""
    plan = harness.scheduler.schedule(float(harness.num_steps))
    harness.num_steps += 1
    before, harness._before = harness._before, (plan, harness.executor.execute(plan))
    if not harness.overlap:
        before, harness._before = harness._before, None
    return harness.scheduler.update(*before) if before is not None else []


def asked(request_id: str, rng: random.Random) -> NewRequest:
    prompt = (*rng.choice([(0, 1, 2, 3), (0, 1, 4, 4), ()]), rng.randrange(5))[: rng.randint(1, 5)]
    sampling = SamplingSpec(
        seed=rng.randrange(3), stop_token_ids=rng.choice([(), (3,)]), num_prompt_logprobs=rng.choice([None, None, 0])
    )
    new = NewRequest(request_id, prompt, rng.randint(1, 7 - len(prompt) + 1), sampling, priority=rng.randrange(3))
    caller, salt = rng.choice(["", "a", "b"]), rng.choice(["", "", "salt"])
    return replace(new, caller=caller, cache_salt=salt, needs_output_tokens=rng.random() < 0.3)


@pytest.mark.parametrize("seed", range(60))
def test_a_replay_makes_the_plans_that_were_made(tmp_path: Path, seed: int) -> None:
    harness = storm(tmp_path / "recording", seed)
    found = replay(str(tmp_path / "recording"))
    assert found.first_difference is None
    assert found.num_equal == found.num_plans == harness.num_steps > 20
    assert found.num_requests == len(harness.outputs)


def test_another_decision_is_found(tmp_path: Path) -> None:
    path = tmp_path / "recording"
    storm(path, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    place, event = next((i, e) for i, e in enumerate(map(json.loads, lines)) if e[0] == "plan" and len(e[5]) > 1)
    event[5][0][2] += 1
    lines[place] = json.dumps(event).encode() + b"\n"
    path.write_bytes(b"".join(lines))
    found = replay(str(path))
    assert found.first_difference is not None and found.first_difference.step_id == event[1]
    assert found.num_equal < found.num_plans


def test_no_token_and_no_name_is_in_a_recording(tmp_path: Path) -> None:
    def recorded(path: Path, prompt: tuple[int, ...], caller: str) -> str:
        config = Harness(num_blocks=64).scheduler.config
        scheduler = RecordedScheduler(str(path), config, make_policy("fcfs"), PrefixCache(bytes(32)))
        new = NewRequest("chatcmpl-secret", prompt, 4, SamplingSpec(), caller=caller, cache_salt="salty")
        scheduler.add(new)
        scheduler.schedule()
        scheduler.abort("chatcmpl-secret")
        scheduler._file.flush()
        return path.read_text()

    prompt = tuple(range(70_000, 70_020))
    first, second = (recorded(tmp_path / name, prompt, "someone") for name in "ab")
    for text in (first, second):
        assert "secret" not in text and "someone" not in text and "salty" not in text
        assert not any(str(token) in text for token in prompt)
    grains = [json.loads(text.splitlines()[2])[3] for text in (first, second)]
    assert len(grains[0]) == 5 and not {*grains[0]} & {*grains[1]}, "each recording has a key of its own"


def test_equal_blocks_after_other_beginnings_look_different(tmp_path: Path) -> None:
    config = Harness(num_blocks=64).scheduler.config
    path = tmp_path / "recording"
    scheduler = RecordedScheduler(str(path), config, make_policy("fcfs"), PrefixCache(bytes(32)))
    for number, first in enumerate((1, 2, 1)):
        scheduler.add(NewRequest(str(number), (first, 0, 0, 0, 5, 6, 7, 8), 4, SamplingSpec()))
    scheduler._file.flush()
    one, other, again = (event[3] for event in map(json.loads, path.read_text().splitlines()) if event[0] == "add")
    assert one == again and one[0] != other[0] and one[1] != other[1]


def test_a_core_that_follows_goes_on_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "recording"
    plans = sum(storm(path, seed).num_steps for seed in (1, 2))
    found = replay(str(path))
    assert (found.num_sessions, found.num_equal, found.num_plans) == (2, plans, plans)


def test_what_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "recording"
    storm(path, 4)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    found = replay(str(path))
    assert found.first_difference is None and found.num_plans > 10


START = (
    '["start",{{"schema":1,"policy":"fcfs","prefix_caching":true,"num_rules":0,"time_s":0.0,"config":'
    '{{"max_num_seqs":4,"max_num_batched_tokens":64,"max_model_len":64,"block_size":16,"num_blocks":{blocks}}}}}]\n'
)
ADD = (
    '["add",0,{{"prompt":{prompt},"given":0,"max_tokens":1,"priority":0,"arrival_s":0.0,"caller":"","weight":1,'
    '"waits":false,"prompt_logprobs":false,"logprobs_sent":0,"cached":0}},[]]\n'
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no line"),
        ("hello\n", "line 1"),
        ('["clear"]\n', "begin with a start"),
        ('["start",{"schema":99}]\n', "schema is 99"),
        ('["start",{"schema":1}]\n', "line 1"),
        ('["what",1]\n', "an event 'what'"),
        ("[]\n", "line 1"),
        ("7\n", "line 1"),
        (START.format(blocks=2**40), "limits of its scheduler"),
        (START.format(blocks="64.5"), "num_blocks is no whole number"),
        (START.format(blocks=64) + ADD.format(prompt=2**63 - 1), "line 2: a request of 9,"),
        (START.format(blocks=64) + ADD.format(prompt="null"), "prompt is no whole number"),
    ],
)
def test_what_is_no_recording_is_refused_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "recording"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=said):
        replay(str(path))


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    config = Harness().scheduler.config
    with pytest.raises(ConfigurationError, match=r"record: .* cannot be written"):
        RecordedScheduler(str(tmp_path / "no" / "f"), config, make_policy("fcfs"), NullPrefixCache())


def test_a_full_disk_ends_the_recording_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "recording"
    monkeypatch.setattr(recording, "MOST_BYTES", 2000)
    harness = storm(path, 5)
    assert harness.num_steps > 20 and all(output.finish_reason for output in [*harness.outputs.values()][:5])
    assert os.path.getsize(path) <= 2000
    assert replay(str(path)).first_difference is None
