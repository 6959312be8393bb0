"""`quire top`: what a running server does, in the terminal; the live view at /ui has the pictures."""

import argparse
import shutil
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from quire.errors import ConfigurationError

if TYPE_CHECKING:
    from quire.cli.remote_server import Server

EXAMPLES = """examples:
  quire top
  quire top host:8000 --admin-api-key SECRET
  quire top --once

A row is a request: its bar is the blocks that it holds. Ctrl-C ends it."""
HERE = "http://127.0.0.1:8000"
HOME_AND_CLEAR = "\x1b[H\x1b[J"


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("place", metavar="URL", nargs="?", help=f"as --url (default: {HERE})")
    parser.add_argument("--url", metavar="URL", help="the server, such as 127.0.0.1:8000")
    parser.add_argument("--admin-api-key", metavar="KEY", help="the server's admin key, if it has one")
    parser.add_argument("--every", type=float, default=1.0, metavar="S", help="seconds between two looks (default: 1)")
    parser.add_argument("--model", metavar="NAME", help="of a server of several models; the first")
    parser.add_argument("--once", action="store_true", help="look once")


def run(options: argparse.Namespace) -> int:
    """Look again and again."""
    from quire.cli.remote_server import Server  # its HTTP client is slow to import

    if not 0.1 <= options.every <= 3600:
        raise ConfigurationError("every must be between 0.1 and 3600 seconds", field="every")
    given = [url for url in (options.place, options.url) if url is not None]
    if len(given) > 1:
        raise ConfigurationError("url stands there twice, as a word and as --url", field="url")
    server = Server(given[0] if given else HERE, options.admin_api_key)
    with suppress(KeyboardInterrupt):
        _look(server, options)
    return 0


def _look(server: "Server", options: argparse.Namespace) -> None:
    blocks = dict[int, list[int]]()
    since, chosen = -1, "" if options.model is None else f"&model={quote(options.model, safe='')}"
    while True:
        frame = server.look_up(f"/ui/frame?since={since}{chosen}")
        since = frame["version"]
        for request in frame["requests"]:
            request["blocks"] = request["blocks"] if request["blocks"] is not None else blocks.get(request["index"], [])
        blocks = {request["index"]: request["blocks"] for request in frame["requests"]}
        width, height = shutil.get_terminal_size((100, 40))
        shown = "\n".join(lines(frame, width, height))
        if options.once or not sys.stdout.isatty():
            print(shown, flush=True)
        else:
            print(HOME_AND_CLEAR + shown, end="", flush=True)
        if options.once:
            return
        time.sleep(options.every)


def lines(frame: dict[str, Any], width: int, height: int) -> list[str]:
    """A frame as text of so many columns, and at most so many lines."""
    size, total, free = frame["block_size"], frame["num_blocks"], frame["num_free_blocks"]
    held = total - free
    asked = frame["prefix_queries"]
    hits = f"{frame['prefix_hits'] / asked:.0%}" if asked else "-"
    room = max(10, width - 12)
    full = round(room * held / total) if total else 0
    cached = min(room - full, round(room * frame["num_cached_blocks"] / total)) if total else 0
    found = [
        f"{frame['model']}: {frame['num_running']} running, {frame['num_waiting']} waiting, "
        f"{frame['tokens_per_s']:.1f} tok/s, prefix cache {hits}",
        f"TTFT {_percentiles(frame['ttft_s'])}   time per token {_percentiles(frame['itl_s'])}",
        f"blocks [{'#' * full}{'.' * cached}{' ' * (room - full - cached)}]",
        f"       {held} of {total} held, {frame['num_cached_blocks']} cached and free, {size} tokens each",
        "",
        f"{'state':10} {'why':10} {'prompt':>7} {'out':>6} {'blocks':>6}  request",
    ]
    most = max((len(request["blocks"]) for request in frame["requests"]), default=1) or 1
    for request in frame["requests"]:
        bar = "#" * round(20 * len(request["blocks"]) / most)
        text = (
            f"{request['state'][:10]:10} {request['reason'][:10]:10} {request['num_prompt']:>7} "
            f"{request['num_output']:>6} {len(request['blocks']):>6}  {bar:20} {request['name']}"
        )
        found.append(text[:width])
    if len(found) > height - 1:
        rest = len(found) - height + 2
        found = [*found[: height - 2], f"... and {rest} more"]
    return found


def _percentiles(seconds: dict[str, float]) -> str:
    return " ".join(f"{name} {value * 1e3:.0f} ms" for name, value in seconds.items()) or "-"
