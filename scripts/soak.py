"""Soak: servers under load with more threads than processors and random kills; every answer is held against the
undisturbed one, every cached block against a new computation.

    scripts/soak [--minutes 1] [--seed N] [--busy 4] [--families 8] [--model DIR] [--out FILE]
    scripts/soak --seed N --epoch K          one server of an earlier run, again and again

The undisturbed answers come from a server that computes one request at a time and has no prefix cache. Then, epoch
after epoch, a server with settings of its own (chunks of 16 to 64 tokens, a small cache, blocks of 8 to 32) answers
rounds of streams; in about every second round its core is killed. At the end of a round, all that it has cached is
computed again and compared (`--verify-cached-blocks`). Two processors are shared with `--busy` programs, mostly.

One line of JSON for each round and each difference goes to `--out`, which is begun anew. Exit 1 when a token, a
log-probability, a text or a block differs, or a stream is lost. Linux only.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, fields, replace
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import httpx

from scripts.served import Answer, Part, Server, open_client, stream
from scripts.soak_weather import NUM_LONG, as_flags, make_families, make_settings

NUM_FAMILIES = 16
EPOCH_SECONDS = 20
"""The last round on a server has begun by then."""
NUM_PROCESSORS = 2
SLACK_SECONDS = 240
"""A run that takes so much longer than it was asked to is cut off, and has failed."""
SPINNING = "import os\nparent = os.getppid()\nos.nice(5)\nwhile os.getppid() == parent:\n    sum(range(100_000))"
"""What keeps a processor busy, as nice as a core is."""
LEFT = "its client left"
PASS = re.compile(r"^(\d+) cached blocks (?:are in doubt|compared: (\d+), different: \d+)$", re.MULTILINE)
WRONG = re.compile(r"^\d+ (cached block \d+ is wrong .*)$", re.MULTILINE)
LEAVERS = 0.1
"""Of the streams, those that the client leaves before their end."""
METRICS = {
    "preemptions": "quire:num_preemptions_total",
    "prefix_hits": "quire:prefix_cache_hits_total",
    "died": r"quire:engine_core_restarts_total\S*died",
    "hung": r"quire:engine_core_restarts_total\S*hung",
}
FIGURES = (*METRICS, "blocks_compared", "blocks_different")
"""Those that a server and its cores tell, since they started."""


def difference(found: Answer, whole: Answer) -> dict[str, Any] | None:
    """Where an answer is first not the undisturbed one."""
    if found.end != "done" or found.parts.keys() != whole.parts.keys():
        return {"end": found.end, "sequences": len(found.parts), "expected": len(whole.parts)}
    for index, expected in sorted(whole.parts.items()):
        for name in (item.name for item in fields(Part)):
            one, other = getattr(found.parts[index], name), getattr(expected, name)
            if one == other:
                continue
            if not (isinstance(one, list) and isinstance(other, list)):
                return {"sequence": index, "field": name, "actual": one, "expected": other}
            length = min(len(one), len(other))
            at = next((place for place in range(length) if one[place] != other[place]), length)
            values = {"actual": one[at : at + 3], "expected": other[at : at + 3]}
            return {"sequence": index, "field": name, "position": at, **values}
    return None


class BlockLog:
    """What the cores of a server said of their cached blocks."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def wait(self) -> None:
        """Return when the present core has compared all that it has cached."""
        patience_s = time.monotonic() + 90
        while self._is_in_doubt():
            if time.monotonic() > patience_s:
                raise SystemExit("the cached blocks were not compared in 90 s")
            await asyncio.sleep(0.005)

    def _is_in_doubt(self) -> bool:
        pid = str(self._server.core_pid())
        words = [count for teller, count in PASS.findall(self._server.said()) if teller == pid]
        return bool(words) and not words[-1]

    def figures(self) -> dict[str, int]:
        """Since the server started."""
        compared = {teller: int(count) for teller, count in PASS.findall(self._server.said()) if count}
        return {"blocks_compared": sum(compared.values()), "blocks_different": len(self.wrong())}

    def wrong(self) -> list[str]:
        """All differences."""
        return WRONG.findall(self._server.said())


@dataclass(frozen=True)
class Asked:
    """A request, and its undisturbed answer."""

    body: dict[str, Any]
    whole: Answer
    salt: str = ""
    after_s: float = 0.0
    """How long after the round's beginning it is asked."""
    leaves_s: float | None = None
    """How long the client then stays."""


@dataclass
class Soak:
    """One run."""

    options: argparse.Namespace
    client: httpx.AsyncClient
    families: list[list[Asked]]

    async def epoch(self, number: int, end_s: float) -> Counter[str]:
        """One server, beside programs that keep the processors busy, and rounds on it; the figures of all."""
        rng = random.Random(f"{self.options.seed} {number}")
        settings, num_busy = make_settings(rng), rng.choice([0, self.options.busy, self.options.busy])
        log = self.options.out.with_name(f"{self.options.out.stem}-epoch-{number}.log")
        server = Server([*_model(self.options), "--verify-cached-blocks", *as_flags(settings)], log)
        programs = [subprocess.Popen([sys.executable, "-c", SPINNING]) for _ in range(num_busy)]
        try:
            total = await self._rounds(server, rng, min(end_s, time.monotonic() + EPOCH_SECONDS), number, settings)
        finally:
            for program in programs:
                program.kill()
                program.wait()
            status = server.end()
        if status or total["died"] > total["deaths"]:
            told = f"{total['died']} of its cores died, {total['deaths']} were killed"
            raise SystemExit(f"the server ended with {status}; {told}: see {log}")
        if not total["different"] and not total["blocks_different"]:
            log.unlink()
        return total

    async def _rounds(
        self, server: Server, rng: random.Random, end_s: float, number: int, settings: dict[str, Any]
    ) -> Counter[str]:
        """At least one round; none begins after `end_s`."""
        total, before, blocks = Counter(epochs=1), dict.fromkeys(FIGURES, 0), BlockLog(server)
        for index in count():
            begun_s = time.monotonic()
            figures, complaints = await self._round(server, rng)
            await blocks.wait()
            now = {**await self._counted(server), **blocks.figures()}
            complaints += [{"block": text} for text in blocks.wrong()[before["blocks_different"] :]]
            figures.update({name: now[name] - before[name] for name in FIGURES})
            before = now
            seconds = round(time.monotonic() - begun_s, 2)
            self._write({"epoch": number, "round": index, **settings, **figures, "seconds": seconds})
            for complaint in complaints:
                self._complain({"epoch": number, "round": index, "settings": settings, **complaint})
            total.update(figures)
            if time.monotonic() > end_s:
                return total
        raise AssertionError("there is always another round")

    async def _round(self, server: Server, rng: random.Random) -> tuple[Counter[str], list[dict[str, Any]]]:
        """The streams of some families, maybe with a death among them; figures and differences."""
        chosen: list[Asked] = []
        for family in rng.sample(self.families, min(self.options.families, rng.choice([1, 4, 8, 8]))):
            salt = rng.choice(["", str(rng.random())])  # a new one: nothing of the family is cached
            after_s = rng.choice([0.0, rng.random()])  # the short ones come while others run
            for number, asked in enumerate(family):
                leaves_s = rng.random() if rng.random() < LEAVERS else None
                begins_s = after_s if number >= NUM_LONG else 0.0
                chosen.append(replace(asked, salt=salt, after_s=begins_s, leaves_s=leaves_s))
        seen = [0]
        tasks = [asyncio.ensure_future(self._ask(server, asked, seen)) for asked in chosen]
        share = rng.choice([None, rng.random() * 0.9])
        if share is not None:
            characters = sum(len(part.text) for asked in chosen for part in asked.whole.parts.values())
            while seen[0] < share * characters and not all(task.done() for task in tasks):
                await asyncio.sleep(0.001)
            while server.core_pid() is None:
                await asyncio.sleep(0.001)
            server.kill_core(signal.SIGKILL)
        found = await asyncio.gather(*tasks)
        wrong = []
        for asked, answer in zip(chosen, found, strict=True):
            place = difference(answer, asked.whole)
            if place is not None and answer.end != LEFT:
                wrong.append({"killed": share is not None, **place, "salt": asked.salt, "request": asked.body})
        num_left = sum(answer.end == LEFT for answer in found)
        counted = {"streams": len(chosen) - num_left, "left": num_left, "different": len(wrong)}
        return Counter(rounds=1, deaths=int(share is not None), **counted), wrong

    async def _ask(self, server: Server, asked: Asked, seen: list[int]) -> Answer:
        await asyncio.sleep(asked.after_s)
        try:
            async with asyncio.timeout(asked.leaves_s):
                return await stream(self.client, server.url, {**asked.body, "cache_salt": asked.salt}, seen)
        except TimeoutError:
            return Answer(end=LEFT)
        except httpx.HTTPError as error:
            return Answer(end=f"{type(error).__name__}: {error}")

    async def _counted(self, server: Server) -> dict[str, int]:
        """The server's own figures since it started."""
        text = (await self.client.get(server.url.removesuffix("/v1") + "/metrics")).text
        return {
            name: int(float(re.findall(rf"^{metric}\S* (\S+)$", text, re.MULTILINE)[0]))
            for name, metric in METRICS.items()
        }

    def _complain(self, complaint: dict[str, Any]) -> None:
        again = f"scripts/soak --seed {self.options.seed} --epoch {complaint['epoch']}"
        print(json.dumps({"again": again, **complaint}), file=sys.stderr, flush=True)
        self._write(complaint)

    def _write(self, line: dict[str, Any]) -> None:
        with self.options.out.open("a") as out:
            out.write(json.dumps(line) + "\n")


async def run(options: argparse.Namespace) -> Counter[str]:
    """All epochs; the figures of the run."""
    async with open_client() as client:
        alone = Server(
            [*_model(options), "--max-num-seqs", "1", "--no-enable-prefix-caching"],
            options.out.with_name(f"{options.out.stem}-undisturbed.log"),
        )
        try:
            families = [
                [Asked(body, await stream(client, alone.url, body, [0])) for body in family]
                for family in make_families(options.seed, NUM_FAMILIES)
            ]
        finally:
            alone.end()
        if lost := [asked.whole.end for family in families for asked in family if asked.whole.end != "done"]:
            raise SystemExit(f"an undisturbed answer failed: {lost[0]}")
        soak, total = Soak(options, client, families), Counter[str]()
        end_s = time.monotonic() + 60 * options.minutes
        for number in count():
            total.update(await soak.epoch(number if options.epoch is None else options.epoch, end_s))
            if time.monotonic() > end_s:
                break
    return total


def _model(options: argparse.Namespace) -> list[str]:
    return [options.model] if options.model else []


def _stop(number: int, frame: Any) -> NoReturn:
    raise SystemExit(f"stopped by {signal.Signals(number).name}")


def main() -> int:
    """Run, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="until the last round begins")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32, help="of requests, settings and kills")
    parser.add_argument("--epoch", type=int, help="only this one, again and again")
    parser.add_argument("--busy", type=int, default=4, help="programs that keep the processors busy")
    parser.add_argument("--families", type=int, default=8, help="of 8 requests that begin alike, at most in a round")
    parser.add_argument("--model", help="a directory; the embedded model")
    parser.add_argument("--out", type=Path, default=Path("build/soak.jsonl"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:NUM_PROCESSORS])
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, _stop)
    signal.alarm(int(60 * options.minutes) + SLACK_SECONDS)
    total = asyncio.run(run(options))
    print(
        f"seed {options.seed}: {total['epochs']} servers, {total['rounds']} rounds, {total['deaths']} deaths, "
        f"{total['hung']} hangs; {total['streams']:,} streams compared, {total['different']:,} different; "
        f"{total['blocks_compared']:,} cached blocks compared, {total['blocks_different']:,} different; "
        f"{total['preemptions']:,} preemptions, {total['prefix_hits']:,} tokens from the prefix cache"
    )
    return 1 if total["different"] or total["blocks_different"] else 0


if __name__ == "__main__":
    sys.exit(main())
