"""Ollama's API as its own client asks for it, unchanged: over a tiny random model, and over an engine that says what a
test wants."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema_rs
import ollama
import pytest

from quire.llm import AsyncLLM
from quire.server.doors.all import DOORS
from quire.server.doors.ollama.models import in_short
from quire.text.parsers.choose import choose
from tests.conftest import PATIENCE_S
from tests.server.conftest import MODEL, Running, start
from tests.server.fake_engine import FakeEngine
from tests.server.test_tool_answers import ANSWERS
from tests.server.tool_models import THINKING, make_caller

HELLO: Any = [{"role": "user", "content": "hello"}]
PLACE = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Bern", "Oslo"]},
        "unit": {"type": "string", "enum": ["C", "F"]},
    },
    "required": ["city", "unit"],
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "get_weather", "description": "Of a city.", "parameters": PLACE}}
]
TIMES = ("total_duration", "prompt_eval_duration", "eval_duration", "created_at")
BASE: dict[str, Any] = {"model": MODEL, "messages": HELLO, "options": {"num_predict": 4}}


def connect(running: Running, **headers: str) -> ollama.Client:
    return ollama.Client(running.url, timeout=PATIENCE_S, headers=headers)


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Of a model that likes to open calls."""
    directory = make_caller(tmp_path_factory.mktemp("caller") / "model")
    running = start(AsyncLLM(str(directory), max_num_seqs=8), apis=DOORS)
    yield running
    running.stop()
    running.engine.close()


@pytest.fixture(scope="module")
def telling() -> Iterator[Running]:
    engine = FakeEngine()
    engine.answer_format = choose(THINKING, {})
    running = start(engine, apis=DOORS)
    yield running
    running.stop()


@pytest.fixture
def http(telling: Running) -> Iterator[httpx.Client]:
    telling.engine.says = None
    with httpx.Client(base_url=telling.url) as session:
        yield session


def whole_of(parts: list[ollama.ChatResponse]) -> Any:
    """The answer that a stream's parts make, as the client's users put it together."""
    last = parts[-1].model_dump(exclude={*TIMES})
    message: dict[str, Any] = {"role": "assistant", "content": "", "thinking": "", "tool_calls": []}
    for part in parts:
        message["content"] += part.message.content or ""
        message["thinking"] += part.message.thinking or ""
        message["tool_calls"] += [call.model_dump() for call in part.message.tool_calls or ()]
    return last | {"message": {name: value or None for name, value in message.items()}}


def plain(answer: ollama.ChatResponse) -> Any:
    message = {name: answer.message.get(name) or None for name in ("role", "content", "thinking")}
    calls = [call.model_dump() for call in answer.message.tool_calls or ()]
    return answer.model_dump(exclude={*TIMES}) | {"message": {**message, "tool_calls": calls or None}}


@pytest.mark.client("ollama", "chat(tools, options)", "chat(tools, options, stream)")
def test_a_stream_equals_the_whole_answer(caller: Running) -> None:
    client, names = connect(caller), []
    for seed in range(4):
        options = {"seed": seed, "temperature": 1.0, "num_predict": 200}
        asked: Any = {"model": f"{MODEL}:latest", "messages": HELLO, "tools": TOOLS, "options": options}
        whole, parts = client.chat(**asked), list(client.chat(**asked, stream=True))
        assert whole_of(parts) == plain(whole)
        assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
        for call in whole.message.tool_calls or ():
            jsonschema_rs.validator_for(PLACE).validate(dict(call.function.arguments))
            names.append(call.function.name)
    assert {*names} == {"get_weather"}


def test_durations_are_those_of_the_engine(caller: Running) -> None:
    answer = connect(caller).chat(MODEL, HELLO, options={"num_predict": 8, "temperature": 0})
    assert answer.eval_count == 8 or answer.done_reason == "stop"
    assert (answer.load_duration, answer.model) == (0, MODEL)
    total, prompt, rest = answer.total_duration, answer.prompt_eval_duration, answer.eval_duration
    assert total is not None and prompt is not None and rest is not None
    assert prompt > 1000 and rest > 1000 and prompt + rest <= total < PATIENCE_S * 1e9


@pytest.mark.client("ollama", "chat(format)", "generate(format)")
def test_an_answer_is_held_to_a_schema(caller: Running) -> None:
    answer = connect(caller).chat(MODEL, HELLO, format=PLACE, options={"num_predict": 400, "seed": 1})
    jsonschema_rs.validator_for(PLACE).validate(json.loads(answer.message.content or ""))
    some = connect(caller).generate(MODEL, "hello", format="json", options={"num_predict": 300, "seed": 2})
    if some.done_reason == "stop":
        assert isinstance(json.loads(some.response or ""), dict)


@pytest.mark.client("ollama", "generate(system, options)", "generate(context)", "generate(raw)", "generate(stream)")
def test_generate_goes_on_from_a_context(caller: Running) -> None:
    """The tokens of both turns: what a chat of them would be, but for the end of the answer between."""
    client, options = connect(caller), {"num_predict": 3, "temperature": 0}
    first = client.generate(MODEL, "one", system="Be brief.", options=options)
    assert first.context is not None and first.prompt_eval_count == len(first.context) - 3
    second = client.generate(MODEL, "two", context=first.context, options=options)
    alone = client.generate(MODEL, "two", options=options)
    assert second.context is not None and alone.context is not None
    assert list(second.context[: len(first.context)]) == list(first.context)
    assert second.prompt_eval_count == len(first.context) + (alone.prompt_eval_count or 0)
    raw = client.generate(MODEL, "two", raw=True, options=options)
    assert raw.prompt_eval_count == len("two") and raw.context is None
    parts = list(client.generate(MODEL, "one", system="Be brief.", options=options, stream=True))
    assert "".join(part.response or "" for part in parts) == first.response
    assert parts[-1].context == first.context


@pytest.mark.parametrize(
    ("number", "short"),
    [
        (0, ""),
        (512, "512"),
        (73_728, "73.73K"),
        (134_515_008, "134.52M"),
        (1_235_814_400, "1.2B"),
        (70_553_706_496, "70.6B"),
    ],
)
def test_parameters_are_counted_as_ollama_does(number: int, short: str) -> None:
    assert in_short(number) == short


@pytest.mark.client("ollama", "list", "ps", "show", "pull", "pull(stream)")
def test_what_is_served(caller: Running) -> None:
    client = connect(caller)
    (card,) = client.list().models
    files = caller.engine.model_files
    assert (card.model, card.size, card.digest) == (MODEL, files.num_bytes, files.fingerprint)
    details = card.details
    assert details is not None and (details.format, details.family, details.families) == (
        "safetensors",
        "llama",
        ["llama"],
    )
    assert details.parameter_size == in_short(files.model.num_parameters) and details.quantization_level == "BF16"
    (loaded,) = client.ps().models
    assert loaded.context_length == caller.engine.max_model_len and loaded.expires_at is not None
    shown = client.show(MODEL)
    assert {"completion", "tools"} == {*(shown.capabilities or ())} and shown.template
    about = shown.modelinfo or {}
    assert about[f"{about['general.architecture']}.context_length"] == caller.engine.max_model_len
    assert about["general.parameter_count"] == files.model.num_parameters > 0
    assert [part.status for part in client.pull(MODEL, stream=True)][-1] == "success"
    assert client.pull(MODEL).status == "success"
    for refused in (
        lambda: client.create("mine", from_=MODEL),
        lambda: client.push(MODEL),
        lambda: client.embed(MODEL, "x"),
        lambda: client.embeddings(MODEL, "x"),
        lambda: client.delete(MODEL),
        lambda: client.pull("llama3"),
    ):
        with pytest.raises(ollama.ResponseError, match=r"not supported|no models|running server stays"):
            refused()


@pytest.mark.parametrize("says", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("think", [None, True, False, "low"])
@pytest.mark.client("ollama", "chat", "chat(tools, stream)")
def test_parts_of_answers(telling: Running, says: str, think: Any) -> None:
    telling.engine.says = says
    tools = [*TOOLS, {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]
    asked: Any = {"model": MODEL, "messages": HELLO, "tools": tools, "think": think}
    whole = connect(telling).chat(**asked)
    assert whole_of(list(connect(telling).chat(**asked, stream=True))) == plain(whole)
    assert bool(whole.message.thinking) == (says.startswith("<think>") and think is not False)
    if says == ANSWERS["calls"]:
        calls = [(call.function.name, call.function.arguments) for call in whole.message.tool_calls or ()]
        assert calls == [("get_weather", {"city": "Köln", "days": 2}), ("now", {})]
    told = next(call for call in reversed(telling.engine.calls) if "messages" in call)["chat_template_kwargs"]
    effort = {"reasoning_effort": "low"} if think == "low" else {}
    assert told == ({} if think is None else {"enable_thinking": bool(think), **effort})


@pytest.mark.client("ollama", "chat(keep_alive, options)")
def test_a_conversation_and_its_options(telling: Running) -> None:
    telling.engine.says = None
    call = {"function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        *HELLO,
        {"role": "assistant", "content": "", "thinking": "Hm.", "tool_calls": [call]},
        {"role": "tool", "content": "rain", "tool_name": "get_weather"},
    ]
    options = {
        **{"num_predict": 3, "temperature": 0.25, "top_k": 5, "top_p": 0.5, "min_p": 0.1, "seed": 9, "stop": ["q"]},
        **{"repeat_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.25, "num_ctx": 256, "num_gpu": -1},
    }
    connect(telling).chat(MODEL, messages, options=options, keep_alive="5m")
    asked, given = (
        next(one for one in reversed(telling.engine.calls) if name in one) for name in ("messages", "params")
    )
    function = {"name": "get_weather", "arguments": {"city": "Oslo"}}
    assert asked["messages"][2:] == [
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "Hm.",
            "tool_calls": [{"type": "function", "function": function}],
        },
        {"role": "tool", "content": "rain", "name": "get_weather"},
    ]
    params = given["params"]
    assert (params.max_tokens, params.temperature, params.top_k, params.top_p, params.min_p) == (3, 0.25, 5, 0.5, 0.1)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.5, 0.5, 0.25)
    assert (params.seed, list(params.stop)) == (9, ["q"])


def test_a_context_holds_prompt_and_answer(http: httpx.Client) -> None:
    options = {"num_ctx": len("user: hello\n") + 5}
    found = http.post("/api/chat", json={**BASE, "options": options, "stream": False}).json()
    assert (found["eval_count"], found["done_reason"]) == (5, "length")
    short = http.post("/api/chat", json={**BASE, "options": {"num_ctx": 5}})
    assert short.status_code == 400 and "options.num_ctx is 5" in short.json()["error"]
    fits = http.post("/api/chat", json={**BASE, "options": {"num_predict": -1}, "stream": False}).json()
    assert fits["eval_count"] == 20, "as many as the engine gives"


def test_nothing_asked_is_a_model_that_is_loaded(http: httpx.Client) -> None:
    assert http.post("/api/chat", json={"model": MODEL}).json()["done_reason"] == "load"
    assert http.post("/api/generate", json={"model": MODEL, "keep_alive": -1}).json()["done_reason"] == "load"
    assert http.post("/api/generate", json={"model": "other"}).status_code == 404


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"model": None}, "model is required"),
    ({"messages": [{"role": "bot"}]}, "messages[0].role must be one of"),
    ({"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, "messages[0].images is not supported"),
    ({"messages": [{"role": "user", "content": "x", "tool_name": "y"}]}, "messages[0].tool_name belongs to the role"),
    ({"options": {"num_ctx": 9999}}, "options.num_ctx may be at most 512"),
    ({"options": {"num_ctx": 0}}, "options.num_ctx must be a whole number"),
    ({"options": {"num_predict": 0}}, "options.num_predict must be a whole number"),
    ({"options": {"num_predict": -1.0}}, "options.num_predict must be a whole number"),
    ({"options": {"mirostat": 2}}, "mirostat is not supported"),
    ({"options": {"repeat_last_n": 64}}, "repeat_last_n is not supported"),
    ({"options": {"num_gpu": 9}}, "num_gpu is not supported: it is said when the server starts"),
    ({"options": {"temprature": 1}}, "unknown field 'temprature'; did you mean 'temperature'?"),
    ({"options": {"repeat_penalty": 9}}, "options.repeat_penalty must be"),
    ({"options": {"top_p": 2}}, "options.top_p must be"),
    ({"options": {"stop": [""]}}, "options.stop"),
    ({"options": []}, "options must be an object"),
    ({"keep_alive": 0}, "keep_alive of 0 is not supported"),
    ({"keep_alive": "0s"}, "keep_alive of 0 is not supported"),
    ({"keep_alive": "soon"}, "keep_alive must be seconds, or a duration"),
    ({"format": "xml"}, "format must be json or a JSON schema"),
    ({"think": "hard"}, "think must be true, false, low"),
    ({"logprobs": True}, "logprobs is not supported"),
    ({"tools": [{"type": "code"}]}, "tools[0] of type 'code' is not supported"),
    ({"template": "x"}, "unknown field 'template'"),
]  # fmt: skip
GENERATE: list[tuple[dict[str, Any], str]] = [
    ({"suffix": "x"}, "suffix is not supported"),
    ({"template": "x"}, "template is not supported"),
    ({"images": ["x"]}, "images is not supported"),
    ({"raw": True, "system": "x"}, "raw leaves system out"),
    ({"raw": True, "context": [1]}, "raw leaves context out"),
    ({"context": [-1]}, "context must be a list of token ids"),
    ({"context": [100000]}, "context must hold ids"),
    ({"width": 5}, "width is not supported"),
]


@pytest.mark.parametrize(("changes", "says"), REFUSALS, ids=lambda value: str(value)[:40])
def test_a_refusal_names_the_field(http: httpx.Client, changes: dict[str, Any], says: str) -> None:
    response = http.post("/api/chat", json={**BASE, **changes})
    assert response.status_code == 400, response.text
    assert {*response.json()} == {"error"} and says in response.json()["error"]


@pytest.mark.parametrize(("changes", "says"), GENERATE, ids=lambda value: str(value)[:40])
def test_a_refusal_of_generate_names_the_field(http: httpx.Client, changes: dict[str, Any], says: str) -> None:
    response = http.post("/api/generate", json={"model": MODEL, "prompt": "x", **changes})
    assert response.status_code == 400 and says in response.json()["error"], response.text


def test_a_model_that_does_not_reason_cannot_think(caller: Running) -> None:
    with pytest.raises(ollama.ResponseError, match="does not support thinking"):
        connect(caller).chat(MODEL, HELLO, think=True)


def test_errors_of_the_http_side_and_of_streams_have_its_shape(http: httpx.Client, telling: Running) -> None:
    for status, response in (
        (404, http.post("/api/chat", json={**BASE, "model": "other"})),
        (404, http.get("/api/nowhere")),
        (405, http.get("/api/chat")),
        (415, http.post("/api/chat", content=b"{}")),
        (400, http.post("/api/blobs/sha256:x", content=b"x")),
        (400, http.post("/api/chat", json={**BASE, "messages": [{"role": "user", "content": "x" * 600}]})),
    ):
        assert response.status_code == status and {*response.json()} == {"error"}, response.text
    failing = [{"role": "user", "content": "fail"}]
    lines = http.post("/api/chat", json={**BASE, "messages": failing}).text.splitlines()
    assert json.loads(lines[-1]) == {"error": "the row broke"} and json.loads(lines[0])["done"] is False
    with pytest.raises(ollama.ResponseError, match="the row broke"):
        list(connect(telling).chat(MODEL, failing, stream=True))


def test_a_key_is_needed() -> None:
    locked = start(FakeEngine(), apis=DOORS, api_key="one")
    try:
        with pytest.raises(ollama.ResponseError) as caught:
            connect(locked).chat(**BASE)
        assert caught.value.status_code == 401
        assert connect(locked, authorization="Bearer one").chat(**BASE).done
    finally:
        locked.stop()
