"""A09: shapes that are dear to compile or to follow. Each ends in an answer or in a 400 that names it, within the
limits; the request beside them is bit for bit what it is alone."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from quire.llm import AsyncLLM
from tests.server.conftest import PATIENCE_S, start

BOMBS: dict[str, dict[str, Any]] = {
    "backtracking": {"regex": "(a+)+b"},
    "ambiguous": {"regex": "(a|a)*(a|a)*b"},
    "counted twice": {"regex": "a{1,100000}{1,100000}"},
    "products": {"regex": ".*.*.*=.*"},
    "ladder": {"regex": "(a?){40}" * 40 + "b"},
    "behind": {"regex": "(a|b)*a(a|b){200}"},
    "look-around": {"regex": "(?=a)a"},
    "nested groups": {"regex": "(" * 20_000 + "a" + ")" * 20_000},
    "deep allOf": {"json": '{"allOf":[' * 3_000 + "{}" + "]}" * 3_000},
    "deep items": {"json": '{"items":' * 63 + "{}" + "}" * 63},
    "cycle": {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}},
    "foreign": {"json": {"$ref": "http://127.0.0.1:9/schema.json"}},
    "unions": {"json": {"allOf": [{"anyOf": [{"required": [f"{a}{b}"]} for b in range(12)]} for a in range(12)]}},
    "enum": {"json": {"enum": [f"{number:x}" for number in range(24_000)]}},
    "large enum": {"json": {"enum": [*range(100_000)]}},
    "properties": {"json": {"properties": {f"p{number}": {} for number in range(9_000)}}},
    "many items": {"json": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9}},
    "left recursion": {"grammar": 'start: start "a" | start start | "a"'},
    "rules": {"grammar": "\n".join(["start: r0", *(f"r{n}: r{n + 1}" for n in range(9_999)), 'r9999: "a"'])},
    "endless": {"grammar": "root ::= root"},
    "no grammar": {"grammar": "::="},
}


def test_shapes_that_are_dear_are_refused_and_touch_no_other(tiny_model: Path) -> None:
    running = start(AsyncLLM(str(tiny_model), max_model_len=512, max_num_seqs=4))

    def ask(prompt: str, max_tokens: int, **more: Any) -> httpx.Response:
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 1.0, "seed": 3, "logprobs": 2, **more}
        return httpx.post(f"{running.url}/v1/completions", content=json.dumps(body), headers=JSON, timeout=PATIENCE_S)

    def canary() -> Any:
        shape = {"json": {"type": "array", "items": {"type": "integer"}, "minItems": 3}}
        return ask("hello", 60, structured_outputs=shape).json()["choices"]

    try:
        alone = canary()
        with ThreadPoolExecutor(4) as pool:
            answers = {name: pool.submit(ask, "x", 40, structured_outputs=shape) for name, shape in BOMBS.items()}
            beside = [canary() for _ in range(5)]
            done = {name: answer.result() for name, answer in answers.items()}
        assert all(one == alone for one in [*beside, canary()])
    finally:
        running.stop()
    for name, answer in done.items():
        assert answer.status_code in (200, 400), (name, answer.text[:300])
        if answer.status_code == 400:
            error = answer.json()["error"]
            assert error["param"] == "structured_outputs" and "structured_outputs" in error["message"], (name, error)
    refused = {name for name, answer in done.items() if answer.status_code == 400}
    assert {"look-around", "deep allOf", "foreign", "large enum", "properties", "endless", "no grammar"} <= refused
    assert "backtracking" not in refused and "left recursion" not in refused


JSON = {"content-type": "application/json"}
