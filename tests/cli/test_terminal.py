"""`quire chat` at a real terminal: a paste is one message, and what was typed is there the next time."""

import json
import os
import pty
import select
import stat
import subprocess
import sys
import time
from pathlib import Path

from quire.cli import history
from tests.cli.test_verbs import ENVIRONMENT
from tests.conftest import PATIENCE_S

UP, PASTE = b"\x1b[A", b"\x1b[200~one\rtwo\r\rthree\x1b[201~"


def talk(tiny: Path, home: Path, typed: list[bytes], *flags: str) -> str:
    """What the terminal showed. Each of `typed` is sent when the prompt is there."""
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "quire", "chat", "--quiet", "--max-tokens", "3", *flags, str(tiny)]
    environment = {**ENVIRONMENT, "XDG_STATE_HOME": str(home), "TERM": "xterm", "INPUTRC": "/dev/null"}
    with subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown, end_s = b"", time.monotonic() + PATIENCE_S
        for keys in [*(item + b"\r" for item in typed), b"\x04"]:
            seen = len(shown)
            while b"> " not in shown[seen:]:
                assert time.monotonic() < end_s, shown
                if select.select([ours], [], [], 0.5)[0]:
                    shown += os.read(ours, 65536)
            os.write(ours, keys)
        assert process.wait(PATIENCE_S) == 0
    os.close(ours)
    return shown.decode(errors="replace")


def saved(home: Path) -> list[str]:
    return [json.loads(line) for line in (home / "quire/chat_history").read_text().splitlines()]


def test_a_paste_is_one_message_and_comes_back_the_next_time(tiny: Path, tmp_path: Path) -> None:
    talk(tiny, tmp_path, [PASTE, b"hi"])
    assert saved(tmp_path) == ["one\ntwo\n\nthree", "hi"]
    place = tmp_path / "quire/chat_history"
    assert (stat.S_IMODE(place.stat().st_mode), stat.S_IMODE(place.parent.stat().st_mode)) == (0o600, 0o700)
    place.chmod(0o644)
    talk(tiny, tmp_path, [UP + UP])
    assert saved(tmp_path)[2:] == ["one\ntwo\n\nthree"]
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    talk(tiny, tmp_path, [b"secret"], "--no-history")
    assert "secret" not in saved(tmp_path)


def test_down_a_pipe_nothing_is_kept(tiny: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "quire", "chat", "--quiet", "--max-tokens", "3", str(tiny)]
    environment = {**ENVIRONMENT, "XDG_STATE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    subprocess.run(words, input="hi\n", text=True, capture_output=True, env=environment, check=True, timeout=PATIENCE_S)
    assert list(tmp_path.iterdir()) == []


def test_a_long_history_is_cut_and_a_damaged_one_read(tmp_path: Path) -> None:
    program = (
        "from quire.cli.history import History, MOST\nimport readline\nHistory(saves=True)\n"
        "print(readline.get_current_history_length(), readline.get_history_item(1))"
    )
    place = tmp_path / "quire/chat_history"
    place.parent.mkdir()
    place.write_text("not json\n" + "".join(f"{json.dumps(str(n))}\n" for n in range(2 * history.MOST + 1)))
    environment = {**ENVIRONMENT, "XDG_STATE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == [str(history.MOST), str(history.MOST + 1)]
    assert len(place.read_text().splitlines()) == history.MOST


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
