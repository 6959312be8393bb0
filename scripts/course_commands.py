"""Run the commands that the course shows, and hold what they print against the pages.

    python -m scripts.course_commands                  # all sections
    python -m scripts.course_commands 1.1 2.1          # some
    python -m scripts.course_commands --show 2.1       # print what the commands print

A fenced block `console` holds commands and their output, as a terminal shows them: `$ quire plan ...`; a line that
ends in a backslash goes on in the next. In the output `...` stands for any text of a line, and alone on a line for
any lines; spaces count as one. In a block `console measured` every number stands for any number, and a bar of `#` for
any bar: the page shows what one run printed. The commands of a section run in their order, in a folder of their own
with the repository's `docs` and `examples`. One that ends in `&` runs beside the others until the section ends; its
output is not compared. Port 8000 is replaced by a free one. Blocks with the word `quick` are also run by the tests.
"""

import argparse
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COURSE = ROOT / "docs/course"
LANGUAGES = ("en", "zh-TW")
PORT = "8000"
NUMBER = r"[+-]?[0-9](?:[0-9,.]*[0-9])?(?:e[+-]?[0-9]+)?"
PARTS = re.compile(rf"\.\.\.|[ \t]*#+|[ \t]+|{NUMBER}|.")


@dataclass(frozen=True, slots=True)
class Command:
    """A command of a page, and the lines under it."""

    line: str
    expected: tuple[str, ...]
    quick: bool = False
    measured: bool = False


@dataclass(slots=True)
class Ran:
    """What a command printed, how long it took, and what of it the page has otherwise."""

    command: Command
    output: str
    seconds: float
    fault: str | None


def sections(language: str) -> dict[str, Path]:
    """The pages of a language by their number, "1.1" and so on."""
    pages = sorted((COURSE / language).glob("[0-9]-[0-9]-*.md"))
    return {path.name[:3].replace("-", "."): path for path in pages}


def commands(text: str) -> list[Command]:
    """The commands of a page, in their order."""
    found = []
    for kind, body in re.findall(r"^```console(.*)\n((?:(?!```).*\n)*)```$", text, re.MULTILINE):
        for part in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
            line, _, output = part.replace("\\\n", "").partition("\n")
            words = kind.split()
            found.append(Command(line, tuple(output.splitlines()), "quick" in words, "measured" in words))
    return found


def difference(command: Command, output: str) -> str | None:
    """The first line of the page that the output lacks, or None where all match."""
    printed = "".join(f"{line.rstrip()}\n" for line in output.rstrip().splitlines())
    patterns = [_pattern(line, command.measured) for line in command.expected]
    if re.fullmatch("".join(patterns), printed):
        return None
    for number, line in enumerate(command.expected, 1):
        if not re.match("".join(patterns[:number]), printed):
            return f"not printed: {line}"
    return "more was printed than the page has"


def _pattern(line: str, measured: bool) -> str:
    if line.strip() == "...":
        return r"(?:.*\n)*?"
    return "".join(_part(text, measured) for text in PARTS.findall(line.rstrip())) + r"\n"


def _part(text: str, measured: bool) -> str:
    if text == "...":
        return ".*?"
    if measured and text.endswith("#"):
        return r"[ \t]*#*"
    if measured and re.fullmatch(NUMBER, text):
        return NUMBER
    return r"[ \t]+" if text.isspace() else re.escape(text)


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@dataclass(slots=True)
class Session:
    """A folder in which the commands of a section run, and what runs beside them."""

    folder: Path
    port: str = field(default_factory=_free_port)
    beside: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def run(self, command: Command, timeout_s: float) -> Ran:
        """Run a command, or start one that ends in `&`."""
        line = re.sub(rf"\b{PORT}\b", self.port, command.line)
        began = time.monotonic()
        if line.endswith("&"):
            self.beside.append(self._start(line[:-1], subprocess.DEVNULL))
            return Ran(command, "", time.monotonic() - began, None)
        process = self._start(line, subprocess.PIPE)
        try:
            output = process.communicate(timeout=timeout_s)[0].decode()
        except subprocess.TimeoutExpired:
            self._end(process)
            return Ran(command, "", time.monotonic() - began, f"still running after {timeout_s:.0f} s")
        output = output.replace(self.port, PORT)
        return Ran(command, output, time.monotonic() - began, difference(command, output))

    def close(self) -> None:
        """End what still runs."""
        for process in self.beside:
            self._end(process)

    def _start(self, line: str, output: int) -> subprocess.Popen[bytes]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "COLUMNS": "100", "LC_ALL": "C.UTF-8"}
        return subprocess.Popen(
            ["bash", "-c", line], cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    @staticmethod
    def _end(process: subprocess.Popen[bytes]) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(timeout=20)
                return
            except subprocess.TimeoutExpired:
                continue
            except ProcessLookupError:
                process.wait()
                return


def run_commands(wanted: list[Command], timeout_s: float) -> Iterator[Ran]:
    """Run the commands of a section in a folder of their own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("docs", "examples"):
            (folder / part).symlink_to(ROOT / part)
        session = Session(folder)
        try:
            for command in wanted:
                yield session.run(command, timeout_s)
        finally:
            session.close()


def main() -> int:
    """Run them, and say how long each section took."""
    parser = argparse.ArgumentParser(description="Run the commands of the course.")
    parser.add_argument("section", nargs="*", help="as 1.1 (left out: all)")
    parser.add_argument("--show", action="store_true", help="print what the commands print")
    parser.add_argument("--seconds", type=float, default=900, help="for all of them (900)")
    options = parser.parse_args()
    pages, began, faults = sections("en"), time.monotonic(), 0
    if unknown := set(options.section) - set(pages):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(pages)}")
    for number in options.section or pages:
        start = time.monotonic()
        number_of_commands = 0
        for ran in run_commands(commands(pages[number].read_text(encoding="utf-8")), 180):
            number_of_commands += 1
            if options.show:
                print(f"$ {ran.command.line}\n{ran.output}  ({ran.seconds:.1f} s)")
            if ran.fault is not None:
                faults += 1
                print(f"{number}: {shlex.quote(ran.command.line)}\n  {ran.fault}\n{ran.output}", file=sys.stderr)
            if time.monotonic() - began > options.seconds:
                print(f"stopped after {options.seconds:.0f} s, in {number}", file=sys.stderr)
                return 1
        print(f"{number}  {number_of_commands} commands  {time.monotonic() - start:6.1f} s", flush=True)
    print(f"in all {time.monotonic() - began:.1f} s, {faults} with another output")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
