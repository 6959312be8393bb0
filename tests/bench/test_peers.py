"""Engines in processes of their own: what a driver may say, what it may do wrong, and that none of it outlives us.

psutil is the judge of processes, numpy of figures.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from quire.bench import engine_turns, peers
from quire.bench.engine_report import Subject, as_json, as_svg, as_text
from quire.bench.engine_turns import Comparison, Started, Turn, figures, yardstick
from quire.bench.offline import measure
from quire.bench.peer_answers import EngineInfo, PeerError, PeerMissing, RunResult, read
from quire.bench.peers import EngineProcess, Spec
from quire.bench.workloads import Item

PATIENCE_S = 30.0
ITEMS = [Item([1, 2, 3], 2), Item([4], 3)]
GOOD = """
import os, subprocess, sys, time
class Engine:
    def __init__(self, settings):
        print("a library's greeting, which must not end up among the answers")
        self.facts = {"versions": {"fake": "1.5"}, "settings": {"threads": settings["threads"]}, "kv_bytes": 4096}
    def run(self, items):
        TROUBLE
        ids = [[7] * item["num_output"] for item in items]
        return {"elapsed_s": 0.5, "ttfts_s": [0.1, 0.3][:len(items)], "token_ids": ids,
                "output_lens": [len(one) for one in ids]}
    def close(self): pass
def start(settings):
    BEGIN
    return Engine(settings)
"""
Make = Callable[..., Spec]
SUBJECT = Subject("m", "bfloat16", 1 << 20, {"W1": "two"}, {"machine": "here"}, [("outputs", "as long as asked")])


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def spec(name: str = "fake", *, trouble: str = "pass", begin: str = "pass", python: str = sys.executable) -> Spec:
        path = tmp_path / f"{name}.py"
        path.write_text(GOOD.replace("TROUBLE", trouble).replace("BEGIN", begin))
        return Spec(name, str(path), python, {"threads": 2})

    return spec


def comes(true: Callable[[], bool]) -> bool:
    until_s = time.monotonic() + PATIENCE_S
    while not true():
        if time.monotonic() > until_s:
            return False
        time.sleep(0.02)
    return True


def is_gone(pid: int) -> bool:
    return comes(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def test_a_driver_speaks_lines(make: Make) -> None:
    with EngineProcess(make()) as peer:
        peer.start(PATIENCE_S)
        assert peer.facts == EngineInfo({"fake": "1.5"}, {"threads": 2}, 4096)
        ran = peer.run(ITEMS, PATIENCE_S)
        assert (ran.elapsed_s, ran.output_lens, ran.token_ids) == (0.5, [2, 3], [[7, 7], [7, 7, 7]])


@pytest.mark.parametrize(
    ("trouble", "begin", "kind", "said"),
    [
        ("items[1]['num_output'] = 9", "pass", PeerError, "an output has 9 tokens where 3 were asked for"),
        ("items[1]['num_output'] = 1", "pass", PeerError, "an output has 1 tokens where 3 were asked for"),
        ("items.pop()", "pass", PeerError, "not as the protocol has it"),
        ("return {'elapsed_s': 0, 'ttfts_s': [0, 0], 'output_lens': [2, 3]}", "pass", PeerError, "$.elapsed_s"),
        ("return {'elapsed_s': 1}", "pass", PeerError, "not as the protocol has it"),
        ("raise ValueError('no such block')", "pass", PeerError, "ValueError: no such block"),
        ("print('the last word', file=sys.stderr, flush=True); os._exit(3)", "pass", PeerError, "ended: the last word"),
        ("pass", "import no_such_engine", PeerMissing, "No module named 'no_such_engine'"),
        ("pass", "raise RuntimeError('no device')", PeerError, "RuntimeError: no device"),
        ("pass", "del settings['threads']", PeerError, "KeyError: 'threads'"),
        (
            "pass",
            "Engine.run, Engine.__init__ = None, lambda self, _: setattr(self, 'facts', {'kv': 1})",
            PeerError,
            "versions",
        ),
    ],
)
def test_what_goes_wrong_is_told(make: Make, trouble: str, begin: str, kind: type[PeerError], said: str) -> None:
    with EngineProcess(make(trouble=trouble, begin=begin)) as peer, pytest.raises(PeerError) as raised:
        peer.start(PATIENCE_S)
        peer.run(ITEMS, PATIENCE_S)
    assert said in str(raised.value) and type(raised.value) is kind


LYING = [
    ("ttfts_s=['x', 1]", "$.ttfts_s[0]"),
    ("ttfts_s=[float('nan')] * 2", "$.ttfts_s[0]"),
    ("ttfts_s=[0.1]", "lists of 2 were due"),
    ("elapsed_s=float('inf')", "$.elapsed_s"),
    ("elapsed_s=1e-320", "$.elapsed_s"),
    ("elapsed_s=True", "$.elapsed_s"),
    ("token_ids=5", "$.token_ids"),
    ("token_ids=[None] * 2", "$.token_ids[0]"),
    ("kv_bytes='lots'", "$.kv_bytes"),
    ("kv_bytes=-1", "$.kv_bytes"),
    ("speed=9", "there is no field speed"),
]
AS_DUE = "dict(elapsed_s=1.0, ttfts_s=[0.1, 0.2], output_lens=[2, 3])"
LYING_AT_ONCE = [
    ('{"ready": {"versions": null, "settings": {}}}', "$.versions"),
    ('{"ready": {"versions": {}, "settings": {"a": {"b": 1}}}}', "$.settings"),
    ('{"ready": 5}', "not as the protocol has it"),
    ('"error"', "where ready was due"),
    ("[" * 100000, "where ready was due"),
    ('{"error": "\\u001b[31mred\\n\\nfake row \\ud800", "missing": 1}', "?[31mred fake row ?"),
]


@pytest.mark.parametrize(("lie", "said"), LYING)
def test_a_lying_driver_is_lost_alone(make: Make, lie: str, said: str) -> None:
    with Comparison(lambda text: None, PATIENCE_S, PATIENCE_S) as comparison:
        assert comparison.start(make("sound"), [])
        assert comparison.start(make("liar", trouble=f"return dict({AS_DUE}, **dict({lie}))"), [])
        comparison.run("W1", 0, ITEMS)
    assert [(one.name, one.state) for one in comparison.started] == [("sound", "ran"), ("liar", "failed")]
    reason = comparison.started[1].reason
    assert reason.startswith("its driver's answer is not as the protocol has it (") and said in reason
    text = as_text(SUBJECT, comparison.turns, comparison.started)
    assert f"liar: failed: {reason}" in text and "sound" in text.split("Not in the table")[0]


@pytest.mark.parametrize(("line", "said"), LYING_AT_ONCE)
def test_what_a_line_says_instead_is_told(line: str, said: str) -> None:
    with pytest.raises(PeerError) as raised:
        read(line.encode(), "ready", EngineInfo)
    text = str(raised.value)
    assert said in text and type(raised.value) is PeerError
    assert text.isprintable() and text.encode() and len(text) <= 500


def test_what_an_engine_says_of_itself_commands_no_terminal() -> None:
    line = b'{"ready": {"versions": {"v\\u001b": "1\\n2"}, "settings": {"a": ["\\u009b", 1, 0.5, true, null]}}}'
    assert read(line, "ready", EngineInfo) == EngineInfo({"v?": "1 2"}, {"a": ["?", 1, 0.5, True, None]})


def test_an_answer_without_an_end_is_told(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "MOST_LINE_BYTES", 3 << 20)
    begin = "[os.write(fd, b'x' * 9999999) for fd in range(3, 9) if os.path.exists(f'/dev/fd/{fd}')]"
    with EngineProcess(make(begin=begin)) as peer, pytest.raises(PeerError, match="more than 3 MiB where ready"):
        peer.start(PATIENCE_S)


def test_silence_has_an_end(make: Make) -> None:
    with EngineProcess(make(trouble="time.sleep(1000)")) as peer:
        peer.start(PATIENCE_S)
        with pytest.raises(PeerError, match=r"no answer within 0.2 s"):
            peer.run(ITEMS, 0.2)
        peer.close(0.0)


def test_who_does_not_read_has_an_end_too(make: Make) -> None:
    """A pipe holds 64 KiB: a longer request waits for its reader."""
    with EngineProcess(make()) as peer:
        peer.start(PATIENCE_S)
        long = [Item([7] * 300_000, 2)]
        assert peer.run(long, PATIENCE_S).output_lens == [2]
        peer.pause()
        with pytest.raises(PeerError, match=r"no answer within 0.5 s"):
            peer.run(long, 0.5)
        peer.close(0.0)


def test_of_many_words_the_last_are_kept(make: Make) -> None:
    """None of them on the disk: it would fill."""
    flood = "sys.stderr.write('words ' * 1_000_000 + '\\nthe last word\\n'); sys.stderr.flush(); os._exit(3)"
    with EngineProcess(make(trouble=flood)) as peer:
        peer.start(PATIENCE_S)
        if sys.platform == "linux":
            assert os.readlink(f"/proc/{peer._process.pid}/fd/2").startswith("pipe:")
        with pytest.raises(PeerError, match="ended: the last word"):
            peer.run(ITEMS, PATIENCE_S)
        assert len(peer._tail) == peers.KEPT_BYTES


def test_an_interpreter_that_is_not_there_is_missing(make: Make) -> None:
    with pytest.raises(PeerMissing, match="/no/such/python cannot be run"):
        EngineProcess(make(python="/no/such/python"))


def test_an_interrupt_leaves_no_process(make: Make, tmp_path: Path) -> None:
    child = tmp_path / "child"
    begin = f"open({str(child)!r}, 'w').write(str(subprocess.Popen(['sleep', '1000']).pid))"
    with pytest.raises(KeyboardInterrupt), EngineProcess(make(begin=begin)) as peer:
        peer.start(PATIENCE_S)
        members = [peer._process.pid, int(child.read_text())]
        assert all(psutil.pid_exists(pid) for pid in members)
        peer.pause()
        raise KeyboardInterrupt
    assert all(is_gone(pid) for pid in members)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_driver_ends_with_us_even_when_we_are_killed(make: Make, tmp_path: Path) -> None:
    spec = make()
    code = (
        "import os, signal, sys\nfrom quire.bench.peers import EngineProcess, Spec\n"
        f"peer = EngineProcess(Spec('fake', {spec.driver!r}, sys.executable, {{'threads': 2}}))\n"
        "peer.start(60)\npeer.pause()\n"
        "print(peer._process.pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert is_gone(int(done.stdout))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_an_engine_that_waits_is_stopped_and_its_peak_begins_anew(make: Make) -> None:
    grow = "big = bytearray(b'x') * (96 << 20 if len(items) == 2 else 1); del big"
    with EngineProcess(make(trouble=grow)) as peer:
        peer.start(PATIENCE_S)
        process = psutil.Process(peer._process.pid)
        peer.run(ITEMS, PATIENCE_S)
        large = peer.peak_bytes()
        peer.pause()
        assert comes(lambda: process.status() == psutil.STATUS_STOPPED)
        peer.resume()
        peer.forget_peak()
        peer.run(ITEMS[:1], PATIENCE_S)
        small = peer.peak_bytes()
        assert large is not None and small is not None
        assert small + (90 << 20) < large < process.memory_info().rss + (110 << 20)


def turn(engine: str, repetition: int, elapsed_s: float, ttfts_s: list[float], ids: list[list[int]] | None) -> Turn:
    ran = RunResult(elapsed_s, ttfts_s, [2, 3], ids)
    return Turn(measure(engine, "W1", repetition, ITEMS, elapsed_s, None), ran, 300 << 20)


def test_figures_are_those_of_numpy() -> None:
    rng = np.random.default_rng(3)
    times = [rng.random(2).tolist() for _ in range(3)]
    ours = [turn("quire", place, 0.5 + place, times[place], [[7, 7], [7, 7, 8]]) for place in range(3)]
    theirs = [turn("other", place, 1.0, [0.5, 0.5], [[7, 7], [7, 9, 8]]) for place in range(3)]
    started = [Started(name, "ran", facts=EngineInfo({}, {}, 1024)) for name in ("quire", "other")]
    found = figures([*ours, *theirs], started)
    one = found["W1", "quire"]
    rates = 5 / np.array([0.5, 1.5, 2.5])
    assert (one.output_rate.median, one.output_rate.least, one.output_rate.most) == pytest.approx(
        (np.median(rates), rates.min(), rates.max())
    )
    assert one.total_rate.median == pytest.approx(9 / 1.5)
    assert one.ttft_s.median == pytest.approx(np.median([np.median(pair) for pair in times]))
    assert one.ttft_p99_s.median == pytest.approx(np.median([np.percentile(pair, 99) for pair in times]))
    assert (one.agreeing, found["W1", "other"].agreeing) == (None, (3, 6))


def test_engines_take_turns_and_who_fails_is_lost(make: Make, tmp_path: Path) -> None:
    said: list[str] = []
    order = tmp_path / "order"
    log = "open({!r}, 'a').write({!r} + ' ')"
    with Comparison(said.append, PATIENCE_S, PATIENCE_S) as comparison:
        for name in ("first", "second"):
            assert comparison.start(make(name, trouble=log.format(str(order), name)), [ITEMS[:1]])
        broken = "if len(items) > 1: raise ValueError('too long')"
        assert comparison.start(make("third", trouble=broken), [ITEMS[:1]])
        assert not comparison.start(make("fourth", begin="import no_such_engine"), [ITEMS[:1]])
        for repetition in range(2):
            comparison.run("W1", repetition, ITEMS)
        members = [peer._process.pid for peer in comparison._peers.values()]
    assert all(is_gone(pid) for pid in members) and len(members) == 2
    assert order.read_text().split() == ["first", "second", "first", "second", "second", "first"]
    states = {one.name: (one.state, one.reason) for one in comparison.started}
    assert states["third"] == ("failed", "ValueError: too long")
    assert states["fourth"][0] == "missing"
    text = as_text(SUBJECT, comparison.turns, comparison.started)
    assert "fourth: not installed: No module named" in text and "third: failed: ValueError: too long" in text
    assert "first 16 tokens as first's in 4 of 4 outputs" in text
    assert len(as_json(SUBJECT, comparison.turns, comparison.started)["runs"]) == 4
    assert as_svg(SUBJECT, comparison.turns, comparison.started).count("<rect") == 1 + 2 * 3
    assert engine_turns.STATES.keys() >= {"missing", "failed", "unfit"}


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process")
def test_an_engine_keeps_to_its_processors(make: Make) -> None:
    usable = os.sched_getaffinity(0)
    one = make(trouble="items[0]['num_output'] = len(os.sched_getaffinity(0))")
    with EngineProcess(replace(one, settings={"threads": 2, "processors": [max(usable)]})) as peer:
        peer.start(PATIENCE_S)
        assert psutil.Process(peer._process.pid).cpu_affinity() == [max(usable)]
        assert peer.run([Item([1], 1)], PATIENCE_S).output_lens == [1]
    assert os.sched_getaffinity(0) == usable


def test_outputs_are_held_against_the_first_that_ran_and_told_them() -> None:
    ids = [[7, 7], [7, 7, 8]]
    turns = [turn("server", 0, 1.0, [0.5, 0.5], None), turn("one", 0, 1.0, [0.5, 0.5], ids)]
    turns += [turn("other", 0, 2.0, [0.5, 0.5], ids), turn("broken", 0, 2.0, [0.5, 0.5], ids)]
    started = [Started("absent", "missing", "no"), Started("odd", "unfit", "no"), Started("broken", "failed", "no")]
    started += [Started("server", "ran"), Started("one", "ran"), Started("other", "ran")]
    assert yardstick(turns, started) == "one" and yardstick(turns[:1], started) is None
    found = figures(turns, started)
    assert found["W1", "other"].agreeing == (2, 2)
    assert found["W1", "one"].agreeing is None and found["W1", "server"].agreeing is None
    assert "first 16 tokens as one's in 2 of 2 outputs" in as_text(SUBJECT, turns, started)
    assert as_json(SUBJECT, turns, started)["agreement_with"] == "one"


def test_the_table_says_what_divides_what_and_what_a_cache_is() -> None:
    turns = [turn("quire", 0, 1.0, [0.5, 0.5], None), turn("static", 0, 3.0, [0.5, 0.5], None)]
    turns[1] = replace(turns[1], ran=replace(turns[1].ran, kv_bytes=3 << 20))
    info = EngineInfo({}, {}, 512 << 20)
    started = [Started("quire", "ran", facts=info), Started("static", "ran"), Started("lost", "failed", "no")]
    text = as_text(SUBJECT, turns, started)
    head, ours, theirs = (line for line in text.splitlines() if line.startswith(("engine", "quire", "static")))
    assert head.endswith("quire / engine") and theirs.endswith("3.00x") and len(head) == len(theirs)
    assert ours.endswith("512 *"), "our own ratio is no news"
    assert "KV: reserved, not touched" in text and "1.50x: quire gives 1.50 times its output" in text
    kept = dict(one.split(": ", 1) for one in text.splitlines() if one.startswith("  "))
    assert "KV cache 512 MiB" in kept["  quire"]
    assert "KV cache without a bound, at most 3 MiB were filled" in kept["  static"]
    alone = as_text(SUBJECT, turns[1:], started[1:])
    assert "quire" not in alone.split("How it was kept fair")[0]


def test_the_environment_of_an_engine_is_its_own(make: Make) -> None:
    spec = make(trouble="items[0]['num_output'] = 1 if os.environ.get('FAKE_ONE') == '1' else 5")
    for environment, fine in (({"FAKE_ONE": "1"}, True), ({}, False)):
        with EngineProcess(Spec(spec.name, spec.driver, spec.python, spec.settings, environment)) as peer:
            peer.start(PATIENCE_S)
            if fine:
                peer.run([Item([1], 1)], PATIENCE_S)
            else:
                with pytest.raises(PeerError, match="5 tokens where 1"):
                    peer.run([Item([1], 1)], PATIENCE_S)
    assert "FAKE_ONE" not in os.environ
