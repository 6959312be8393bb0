"""`quire chat` at a real terminal, with `quire[chat]` and without: lines that go on, what was typed earlier, Ctrl-C."""

import fcntl
import http.server
import json
import os
import pty
import re
import select
import stat
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.markdown import Markdown

from quire.cli import history
from quire.cli.chat_rich import whole_part
from tests.cli.test_verbs import ENVIRONMENT
from tests.conftest import PATIENCE_S

UP, PASTE, ALT_ENTER = b"\x1b[A", b"\x1b[200~one\rtwo\r\rthree\x1b[201~", b"\x1b\r"
PROMPT = b"\x1b[?2004h"
"""Both forms ask for pastes in brackets when they begin to read, and at no other time."""
FORMS = {
    "bare": "import sys; sys.modules['rich'] = None; from quire.cli.main import main; sys.exit(main())",
    "rich": "import sys; from quire.cli.main import main; sys.exit(main())",
}
"""As where `quire[chat]` is not installed, and as where it is."""
SLOW = """
import asyncio
from quire.llm import AsyncLLM
plain = AsyncLLM.generate
async def slow(self, *given):
    async for one in plain(self, *given):
        yield one
        print('begun')
        await asyncio.sleep(0.2)
AsyncLLM.generate = slow
"""


class Typist:
    """A person at a terminal of 24 lines."""

    def __init__(self, home: Path, program: str, *flags: object) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        words = [sys.executable, "-c", program, "chat", "--quiet", *map(str, flags)]
        environment = {**ENVIRONMENT, "XDG_STATE_HOME": str(home), "TERM": "xterm", "INPUTRC": "/dev/null"}
        environment["PROMPT_TOOLKIT_NO_CPR"] = "1"
        self.process = subprocess.Popen(
            words, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(theirs)
        self.shown = b""

    def __enter__(self) -> "Typist":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)

    def see(self, text: bytes, since: int = 0) -> None:
        """Wait until it is shown."""
        end_s = time.monotonic() + PATIENCE_S
        while text not in self.shown[since:]:
            assert time.monotonic() < end_s, self.shown
            if select.select([self._ours], [], [], 0.5)[0]:
                self.shown += os.read(self._ours, 65536)

    def type(self, keys: bytes) -> int:
        """Type when the prompt is there; where on the screen what comes of it begins."""
        self.see(PROMPT, self._read_to)
        self._read_to = len(self.shown)
        os.write(self._ours, keys)
        return self._read_to

    _read_to = 0

    def interrupt(self, seen: bytes, since: int) -> None:
        """Ctrl-C, until it shows: Python loses a signal that comes just before it begins to wait for a key."""
        for _ in range(20):
            os.write(self._ours, b"\x03")
            end_s = time.monotonic() + PATIENCE_S / 20
            while time.monotonic() < end_s and seen not in self.shown[since:]:
                if select.select([self._ours], [], [], 0.2)[0]:
                    self.shown += os.read(self._ours, 65536)
            if seen in self.shown[since:]:
                return
        raise AssertionError(self.shown)

    def say(self, *lines: bytes) -> None:
        """Messages or commands."""
        for line in lines:
            self.type(line + b"\r")

    def leave(self) -> str:
        """With Ctrl-D. All that was shown."""
        self.type(b"\x04")
        assert self.process.wait(PATIENCE_S) == 0
        return self.shown.decode(errors="replace")


def talk(form: str, server: Any, home: Path, *lines: bytes, flags: tuple[str, ...] = ()) -> str:
    with Typist(home, FORMS[form], "--url", server.url, *flags) as person:
        person.say(*lines)
        return person.leave()


def saved(home: Path) -> list[str]:
    return [json.loads(line) for line in (home / "quire/chat_history").read_text().splitlines()]


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_paste_is_one_message_and_comes_back_the_next_time(server: Any, tmp_path: Path, form: str) -> None:
    talk(form, server, tmp_path, PASTE, b"hi")
    assert saved(tmp_path) == ["one\ntwo\n\nthree", "hi"]
    place = tmp_path / "quire/chat_history"
    assert (stat.S_IMODE(place.stat().st_mode), stat.S_IMODE(place.parent.stat().st_mode)) == (0o600, 0o700)
    place.chmod(0o644)
    talk(form, server, tmp_path, UP + UP)
    assert saved(tmp_path)[2:] == ["one\ntwo\n\nthree"]
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    talk(form, server, tmp_path, b"secret", flags=("--no-history",))
    assert "secret" not in saved(tmp_path)


def test_a_person_without_the_extra_is_shown_how_to_get_it(server: Any, tmp_path: Path) -> None:
    assert talk("bare", server, tmp_path).count("pip install 'quire[chat]'") == 1
    assert "pip install" not in talk("rich", server, tmp_path, flags=("--plain",))
    assert "Alt-Enter" in talk("rich", server, tmp_path)


def test_down_a_pipe_nothing_is_kept(tiny: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "quire", "chat", "--quiet", "--max-tokens", "3", str(tiny)]
    environment = {**ENVIRONMENT, "XDG_STATE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    subprocess.run(words, input="hi\n", text=True, capture_output=True, env=environment, check=True, timeout=PATIENCE_S)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_stops_the_answer_of_a_model_here(tiny: Path, tmp_path: Path, form: str) -> None:
    program = SLOW + FORMS[form]
    with Typist(tmp_path, program, "--max-tokens", 100, "--ignore-eos", tiny) as person:
        since = person.type(b"hi\r")
        person.see(b"begun", since)
        person.interrupt(b"[stopped]", since)
        person.say(b"/show")
        assert "user: hi" in person.leave()


def test_ctrl_c_while_typing_says_how_to_leave(server: Any, tmp_path: Path, form: str) -> None:
    with Typist(tmp_path, FORMS[form], "--url", server.url) as person:
        since = person.type(b"half a li")
        person.see(b"half a li", since)
        person.interrupt(b"Ctrl-D leaves", since)
        person.leave()
    assert not (tmp_path / "quire/chat_history").exists()


ANSWER = ["# Title\n\nSome **bo", "ld** text\x1b]0;evil\x07.\n\n", "- one\n- two\n"]


class Server(http.server.BaseHTTPRequestHandler):
    """Answers with Markdown and a character that commands terminals; the message `stall` with a beginning alone."""

    def do_GET(self) -> None:
        self._head("application/json")
        self.wfile.write(b'{"data": [{"id": "one"}]}')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(body)  # type: ignore[attr-defined]
        stalls = body["messages"][-1]["content"] == "stall"
        self._head("text/event-stream")
        for text in ["begun "] if stalls else ANSWER:
            self._event({"choices": [{"delta": {"content": text}}]})
        if stalls:
            self.server.gone = self.rfile.read(1)  # type: ignore[attr-defined]  # until the client goes
            return
        if "stream_options" in body:
            self._event({"choices": [], "usage": {"completion_tokens": 12}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _head(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()

    def _event(self, event: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Any]:
    found: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    found.asked, found.gone = [], None
    found.url = f"http://127.0.0.1:{found.server_port}"
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()
    thread.join()


def test_ctrl_c_stops_the_answer_of_a_server_and_not_the_program(server: Any, tmp_path: Path, form: str) -> None:
    with Typist(tmp_path, FORMS[form], "--url", server.url, "--stats") as person:
        since = person.type(b"stall\r")
        person.see(b"begun", since)
        person.interrupt(b"[stopped]", since)
        person.say(b"next")
        shown = person.leave()
    assert server.gone == b"", "the connection was closed, which ends the request there"
    assert [one["content"] for one in server.asked[1]["messages"]] == ["stall", "begun ", "next"]
    assert re.search(r"\[12 tokens.*; the first after \d+\.\d\d s\]", shown) and "evil\x07" not in shown
    assert server.asked[1]["stream_options"] == {"include_usage": True}


def test_markdown_is_rendered_as_it_streams(server: Any, tmp_path: Path, form: str) -> None:
    with Typist(tmp_path, FORMS[form], "--url", server.url) as person:
        person.say(b"hi", b"/set markdown off", b"again")
        shown = person.leave()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    rendered = form == "rich"
    assert plain.count("Some **bold** text") == (1 if rendered else 2)
    assert ("Some bold text" in plain, "• two" in plain) == (rendered, rendered)
    assert "\x1b]0;" not in shown and "stream_options" not in server.asked[0]


def test_lines_that_go_on(server: Any, tmp_path: Path, form: str) -> None:
    block = b'"""\r b\rc"""\r' if form == "bare" else b" b" + ALT_ENTER + b"c\r"
    with Typist(tmp_path, FORMS[form], "--url", server.url) as person:
        if form == "bare":
            person.type(b"one\\\r")
            person.type(b"two\r")
            for line in (b'"""', b" b", b'c"""'):
                person.type(line + b"\r")
        else:
            person.type(b"one\\\rtwo\r")
            person.type(block)
        person.leave()
    assert [one["messages"][-1]["content"] for one in server.asked] == ["one\ntwo", "b\nc"]


def test_commands_work_where_a_person_types(server: Any, tmp_path: Path, form: str) -> None:
    talk_file = tmp_path / "talk"
    with Typist(tmp_path, FORMS[form], "--url", server.url) as person:
        person.say(b"/system be short", b"/set seed 3", b"hi", f"/save {talk_file}".encode(), b"/clear", b"/retry")
        person.say(f"/load {talk_file}".encode(), b"/retry", b"/help", b"/nonsense")
        person.type(b"/exit\r")
        assert person.process.wait(PATIENCE_S) == 0
        with pytest.raises(OSError):  # the terminal's other end is closed when all has been read
            while True:
                person.shown += os.read(person._ours, 65536)
    first, again = server.asked
    assert first == again and first["seed"] == 3 and first["messages"][0]["content"] == "be short"
    shown = person.shown.decode()
    assert "nothing was asked yet" in shown and "/nonsense is not known" in shown and "go on with one" in shown


TEXTS = [
    "".join(ANSWER[:2]).replace("\x1b]0;evil\x07", "") + ANSWER[2],
    "1. one\n\n2. two\n\n   more of two\n\n3. three\n\nThe end.\n\n9. nine\n\n10. ten\n\nOut.\n\n"
    "| a | b |\n|---|---|\n| 1 | 2 |\n\nlast",
    "Look:\n```python\ndef f():\n\n    return 1\n\nx = 2\n```\nand\n\n~~~\n```\n\nstill code\n~~~\n\nthen\n",
    "> a quote\n\nTitle\n===\n\n- a\n  - b\n\n    inside\n- c\n\nout\n\n```\nnever closed\n\nby it",
]


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_printed_piece_by_piece_is_what_the_whole_text_renders_to(text: str) -> None:
    parts, tail = [], ""
    for character in text:
        tail += character
        end = whole_part(tail)
        if end:
            parts.append(tail[:end])
            tail = tail[end:]
    assert "".join([*parts, tail]) == text and len(parts) >= 2
    assert lines(rendered(text)) == [line for part in [*parts, tail] for line in lines(rendered(part))]


def rendered(text: str) -> str:
    console = Console(width=60, force_terminal=False, color_system=None, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.capture() as captured:
        console.print(Markdown(text))
    return captured.get()


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def test_a_long_history_is_cut_and_a_damaged_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    place = tmp_path / "quire/chat_history"
    place.parent.mkdir()
    place.write_text("not json\n" + "".join(f"{json.dumps(str(n))}\n" for n in range(2 * history.MOST + 1)))
    found = history.History(saves=True).lines()
    assert (len(found), found[0]) == (history.MOST, str(history.MOST + 1))
    assert len(place.read_text().splitlines()) == history.MOST
    place.write_bytes(b"\xff\n")
    assert history.History(saves=True).lines() == []


def test_state_stands_where_xdg_says() -> None:
    before = os.environ.pop("XDG_STATE_HOME", None)
    try:
        assert history.path() == Path.home() / ".local/state/quire/chat_history"
        os.environ["XDG_STATE_HOME"] = "relative"  # to be ignored, by the specification
        assert history.path() == Path.home() / ".local/state/quire/chat_history"
        os.environ["XDG_STATE_HOME"] = "/x"
        assert history.path() == Path("/x/quire/chat_history")
    finally:
        os.environ.pop("XDG_STATE_HOME")
        if before is not None:
            os.environ["XDG_STATE_HOME"] = before
