"""`quire serve` as it runs: its core killed under a response, and the whole of it killed under a batch."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import httpx
import openai

from tests.conftest import PATIENCE_S
from tests.server.conftest import wait_until
from tests.server.test_two_processes import Served, serve

__all__ = ["serve"]
NUM_LINES = 30


def text_of(served: Served, kill_after: int | None = None) -> tuple[str, list[int]]:
    """What a stream says, and the numbers of its events."""
    text, numbers = "", []
    body = {"input": "hi", "max_output_tokens": 120, "ignore_eos": True, "seed": 3, "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/responses", json=body, timeout=PATIENCE_S) as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                event = json.loads(line[6:])
                numbers.append(event["sequence_number"])
                text += event.get("delta", "")
                if len(numbers) == kill_after:
                    assert served.core_pid is not None
                    os.kill(served.core_pid, signal.SIGKILL)
    assert event["type"] == "response.incomplete" and event["response"]["output"][0]["content"][0]["text"] == text
    return text, numbers


def test_a_response_outlives_its_core_and_a_batch_its_server(serve: Any, tmp_path: Path) -> None:
    flags = ("--state-dir", str(tmp_path / "state"))
    served = serve(*flags)
    whole = text_of(served)
    assert text_of(served, kill_after=20)[0] == whole[0]
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    lines = []
    for number in range(NUM_LINES):
        body = {"prompt": f"p{number}", "max_tokens": 40, "ignore_eos": True, "seed": number}
        lines.append(json.dumps({"custom_id": f"l{number}", "method": "POST", "url": "/v1/completions", "body": body}))
    file = client.files.create(file="\n".join(lines).encode(), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    assert wait_until(lambda: client.batches.retrieve(batch.id).request_counts.completed >= 5)  # type: ignore[union-attr]
    core = served.core_pid
    served.kill()
    served.process.wait(PATIENCE_S)
    assert core is not None

    served = serve(*flags)
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    assert wait_until(lambda: client.batches.retrieve(batch.id).status == "completed")
    done = client.batches.retrieve(batch.id)
    assert done.output_file_id is not None and done.error_file_id is None
    found = [json.loads(line) for line in client.files.content(done.output_file_id).text.splitlines()]
    assert [item["custom_id"] for item in found] == [f"l{number}" for number in range(NUM_LINES)]
    for number in (0, NUM_LINES - 1):
        body = {"prompt": f"p{number}", "max_tokens": 40, "extra_body": {"ignore_eos": True}, "seed": number}
        alone = client.completions.create(model=client.models.list().data[0].id, **body)  # type: ignore[arg-type]
        assert found[number]["response"]["body"]["choices"][0]["text"] == alone.choices[0].text
