"""`quire explain`: where the time of a request went, asked of a running server."""

import argparse
import json
from typing import Any
from urllib.parse import quote

EXAMPLES = """examples:
  quire explain chatcmpl-0123456789abcdef0123456789abcdef
  quire explain --url http://host:8000 --admin-api-key SECRET --json cmpl-...

The id is that of the answer (`id`, and the header x-request-id)."""
BAR_WIDTH = 30


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("request_id", metavar="REQUEST_ID")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default: http://127.0.0.1:8000)")
    parser.add_argument("--admin-api-key", metavar="KEY", help="the server's admin key, if it has one")
    parser.add_argument("--json", action="store_true", help="print the server's answer as it is")


def run(options: argparse.Namespace) -> int:
    """Ask and print."""
    from quire.cli.remote_server import Server

    server = Server(options.url, options.admin_api_key)
    answer = server.look_up(f"/v1/requests/{quote(options.request_id, safe='')}/explain")
    if options.json:
        print(json.dumps(answer, indent=2))
        return 0
    for item in answer["data"]:
        print("\n".join(lines(item)))
    return 0


def lines(item: dict[str, Any]) -> list[str]:
    """One explanation for people."""
    state = f"ended with {item['finish_reason']}" if item["finished"] else "still runs"
    shown = [
        f"{item['id']}: {item['num_prompt_tokens']} prompt tokens, {item['num_output_tokens']} generated, {state}",
        item["sentence"],
    ]
    total_s = max(item["total_s"], 1e-9)
    for name, seconds in item["parts"].items():
        if seconds > 0:
            bar = "#" * round(BAR_WIDTH * seconds / total_s)
            shown.append(f"  {name.replace('_', ' '):20} {seconds:10.4f} s {seconds / total_s:6.1%}  {bar}".rstrip())
    shown.append(f"  {'whole':20} {item['total_s']:10.4f} s")
    return shown
