"""What the grammars of all formats let through is read back as calls whose arguments are valid.

Walks at random through the masks that serving uses, over a small vocabulary; the judge is jsonschema.
"""

import json
import random
from itertools import accumulate
from typing import Any

import jsonschema_rs
import numpy as np
import pytest

from quire.core.request import GrammarSpec
from quire.errors import InvalidRequestError, ShapeError
from quire.structured.compiler import GrammarCompiler, Vocabulary
from quire.structured.matcher import Matcher
from quire.structured.source import source_of, validate
from quire.structured_params import StructuredOutputsParams
from quire.text.parsers.events import Asked, CallArguments, CallEnd, CallStart, Content, Event, Reasoning, Tool, joined
from quire.text.parsers.reader import whole
from tests.structured.yaml_texts import read
from tests.text.parsers.samples import ANSWERS, SPECIAL, made

TEXT = {"type": "string"}
PLACE: dict[str, Any] = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
TOOLS = (
    Tool(
        "weather",
        {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "unit": {"type": "string", "enum": ["C", "F"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 14},
                "now": {"type": "boolean"},
                "note": {"type": "string", "maxLength": 8, "minLength": 2},
                "code": {"type": "string", "pattern": "^[a-z]{2}$"},
                "place": {"$ref": "#/$defs/place"},
            },
            "required": ["city", "days"],
            "$defs": {"place": PLACE},
        },
        strict=True,
    ),
    Tool("none"),
    Tool("list_it", {"type": "object", "properties": {"all": {"type": "array", "items": {"type": "number"}}}}, True),
)
WORDS = [
    *("<tool_call>", "</tool_call>", "<think>", "</think>", "weather", "none", "list_it", "\n", "[weather(", "[none("),
    *('{"name": "weather", "parameters": ', '{"name":"none","arguments":', '{"name": "none", "arguments": ', ", "),
    *(
        "<parameter=",
        "</parameter>",
        "\n</parameter>\n",
        "</function>",
        "<｜tool▁calls▁begin｜>",
        "functools[",
        "<function_call>",
        '"}',
        "}]",
        "é",
        "<|",
    ),
]
EOS = 511
TEXTS = {place: bytes((place,)) for place in range(256)}
TEXTS |= {400 + place: word.encode() for place, word in enumerate(WORDS)} | {EOS: b"<eos>"}
TEXTS |= {token: name.encode() for name, token in SPECIAL.items()}
BUSY = [*SPECIAL.values(), *range(400, 400 + len(WORDS))]
COMPILER = GrammarCompiler(
    lambda: Vocabulary([TEXTS.get(place, b"") for place in range(512)], [*SPECIAL.values(), EOS], [EOS], str.encode)
)


def begun(tag: dict[str, Any], max_tokens: int = 2**20) -> Matcher:
    params = StructuredOutputsParams(structural_tag=tag)
    source = source_of(params)
    validate(source, params)
    found = COMPILER._begin(source).result()
    found.check_room(max_tokens)
    return COMPILER.matcher("one", GrammarSpec(source, max_tokens))


def walked(matcher: Matcher, max_tokens: int, seed: int, busy: float = 0.3) -> tuple[list[int], str]:
    """Tokens of one answer, its end left out, and its text; markers come oftener than their number says."""
    draw, found = random.Random(seed), []
    masks = np.zeros((1, 16), np.uint32)
    while len(found) < max_tokens:
        if matcher.forced:
            token = matcher.forced[0]
        else:
            COMPILER.fill_masks([matcher], masks)
            matcher.check()
            allowed = np.flatnonzero(np.unpackbits(masks.view(np.uint8), bitorder="little")).tolist()
            likely = [one for one in allowed if one in BUSY]
            token = matcher.decide(draw.choice(likely if likely and draw.random() < busy else allowed))
        if token == EOS:
            break
        found.append(token)
        matcher.consume(token)
    return found, b"".join(TEXTS[token] for token in found).decode("utf-8", "replace")


def read_json(text: str) -> Any:
    """A number that is too large for a double is one all the same; the judge's library takes infinity for null."""
    return json.loads(text, parse_float=lambda number: max(-1e308, min(1e308, float(number))))


def judge(events: list[Event], *, are_whole: bool = True) -> int:
    """Every call is one of a tool, with arguments that its schema holds. Says how many."""
    names = [one.name for one in events if isinstance(one, CallStart)]
    ends = [one.index for one in events if isinstance(one, CallEnd)]
    if are_whole:
        assert ends == [*range(len(names))]
    for index in ends:
        (arguments,) = [one.text for one in events if isinstance(one, CallArguments) and one.index == index]
        tool = next(tool for tool in TOOLS if tool.name == names[index])
        jsonschema_rs.validate(tool.schema | {"additionalProperties": False}, read_json(arguments))
    return len(ends)


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_that_must_call_is_calls(name: str) -> None:
    """With budgets from the least upwards; one token less is refused."""
    fmt, asked = made(name), Asked(TOOLS, must_call=True)
    tag = fmt.structural_tag(asked)
    assert tag is not None
    found = COMPILER.shortest(source_of(StructuredOutputsParams(structural_tag=tag)))
    assert found is not None
    least = len(found) + 1
    with pytest.raises(ShapeError, match=f"needs {least} tokens"):
        begun(tag, least - 1)
    for seed in range(16):
        room = least + (seed if seed < 8 else seed * 9)
        _, text = walked(begun(tag, room), room, seed)
        events = joined(whole(fmt.parser(asked), text))
        assert judge(events), text
        assert name == "openai" or not any(isinstance(one, Content) for one in events), text


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_that_may_call_is_text_and_calls(name: str) -> None:
    fmt, num_calls = made(name), 0
    for parallel in (True, False):
        asked = Asked(TOOLS, parallel=parallel)
        tag = fmt.structural_tag(asked)
        assert tag is not None
        for seed in range(14):
            room = (40 if name == "openai" else 8) + seed * 20
            _, text = walked(begun(tag, room), room, seed, busy=0.5)
            found = judge(joined(whole(fmt.parser(asked), text)))
            assert parallel or found <= 1, text
            num_calls += found
    assert num_calls > 2


@pytest.mark.parametrize("name", ["hermes", "json", "openai"])
def test_an_answer_is_calls_or_what_it_is_held_to(name: str) -> None:
    then = {"type": "json_schema", "json_schema": PLACE, "disable_additional_properties": True}
    fmt, kinds = made(name, "openai_gptoss" if name == "openai" else "qwen3"), set()
    asked = Asked(TOOLS, may_reason=True, then=then)
    tag = fmt.structural_tag(asked)
    assert tag is not None
    for seed in range(30):
        room = 100 + seed
        _, text = walked(begun(tag, room), room, seed)
        events = joined(whole(fmt.parser(asked), text))
        num_calls, content = judge(events), "".join(one.text for one in events if isinstance(one, Content))
        kinds.add(bool(num_calls))
        if name != "openai":  # which may say something before a call
            assert bool(num_calls) != bool(content), text
        if not num_calls and name != "openai":
            jsonschema_rs.validate(PLACE, read_json(content))
    assert kinds == {True, False}


@pytest.mark.parametrize("name", ["hermes", "llama4_pythonic"])
def test_yaml_stands_behind_reasoning_and_beside_tools(name: str) -> None:
    """With budgets from the least upwards; both readers of YAML read the same, which is valid. Schemas that name some
    keys, and none: the grammar alone keeps keys apart."""
    fmt, num_read, num_calls = made(name, "qwen3"), 0, 0
    inner = {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 2}
    named = {"type": "object", "properties": {"no": TEXT, "in": {"items": inner, "type": "array"}}, "required": ["no"]}
    for seed in range(12):
        schema = (named, inner, {"type": "array", "items": TEXT, "minItems": 1})[seed % 3]
        then = {"type": "json_schema", "json_schema": schema, "style": "yaml"}
        asked = Asked(TOOLS if seed % 2 else (), in_reasoning=seed % 4 < 2, may_reason=True, then=then)
        tag = fmt.structural_tag(asked)
        assert tag is not None
        shortest = COMPILER.shortest(source_of(StructuredOutputsParams(structural_tag=tag)))
        assert shortest is not None
        room = len(shortest) + 1 + (60 if asked.tools else seed**2)
        _, text = walked(begun(tag, room), room, seed, busy=0.5 if asked.tools else 0.1)
        events = joined(whole(fmt.parser(asked), text))
        content = "".join(one.text for one in events if isinstance(one, Content))
        num_calls += judge(events)
        assert asked.tools or content, text
        if content:
            jsonschema_rs.validate(schema, read(content))
            num_read += 1
    assert num_read > 5 and num_calls, (num_read, num_calls)


def test_yaml_may_stand_between_markers() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False}
    inner = {"type": "json_schema", "json_schema": schema, "style": "yaml"}
    tag = {"type": "tag", "begin": "```yaml\n", "content": inner, "end": "\n```"}
    for seed in range(4):
        _, text = walked(begun({"type": "structural_tag", "format": tag}, 40), 40, seed)
        assert text.startswith("```yaml\n") and text.endswith("\n```"), text
        jsonschema_rs.validate(schema, read(text[8:-4]))


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"items": {"not": {}}}, "the keyword 'not' at #/format/json_schema/items cannot be held"),
        ({"properties": {"a": {"$id": "x"}, "b": {"$ref": "#"}}}, r"'\$id' at #/format/json_schema/properties/a"),
        ({"type": "object", "minProperties": 2, "maxProperties": 10**6}, "'maxProperties' at #/format/json_schema is"),
    ],
)
def test_what_yaml_cannot_hold_in_a_tag_is_refused_with_its_place(schema: Any, text: str) -> None:
    tag = {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": schema, "style": "yaml"}}
    with pytest.raises(InvalidRequestError, match=text):
        begun(tag)


@pytest.mark.parametrize("must_call", [True, False])
def test_reasoning_comes_before_and_ends(must_call: bool) -> None:
    fmt = made("hermes", "qwen3")
    for seed in range(16):
        asked = Asked(TOOLS, must_call=must_call, in_reasoning=seed % 2 == 0, may_reason=True)
        tag = fmt.structural_tag(asked)
        assert tag is not None
        room = 150 + seed
        _, text = walked(begun(tag, room), room, seed, busy=0.2)
        events = joined(whole(fmt.parser(asked), text))
        assert judge(events) or not must_call, text


@pytest.mark.parametrize("budget", [0, 1, 7])
@pytest.mark.parametrize("name", ["qwen3", "openai_gptoss", "mistral"])
def test_reasoning_has_no_more_tokens_than_it_may(budget: int, name: str) -> None:
    fmt = made("openai" if name == "openai_gptoss" else "mistral", name)
    reached = 0
    for seed in range(30):
        in_reasoning = seed % 2 == 0 and name != "openai_gptoss"
        asked = Asked(in_reasoning=in_reasoning, may_reason=True, reasoning_budget=budget)
        tag = fmt.structural_tag(asked)
        assert tag is not None
        matcher = begun(tag, 80)
        if not in_reasoning:
            for one in (
                [SPECIAL["<|channel|>"], *b"analysis", SPECIAL["<|message|>"]]
                if name == "openai_gptoss"
                else [TEXTS_OF["<think>"]]
                if name == "qwen3"
                else [*b"[THINK]"]
            ):
                assert matcher.decide(one) == one
                matcher.consume(one)
        tokens, _ = walked(matcher, 60, seed, busy=0.05)
        end = {"qwen3": "</think>", "openai_gptoss": "<|end|>", "mistral": "[/THINK]"}[name]
        data = b"".join(TEXTS[token] for token in tokens)
        before = data.split(end.encode())[0]
        inside = sum(size <= len(before) for size in accumulate(len(TEXTS[token]) for token in tokens))
        assert inside <= budget + 3  # a character is finished
        reached += inside == budget
    assert reached > 10


TEXTS_OF = {text.decode("utf-8", "replace"): token for token, text in TEXTS.items()}


def test_free_text_is_cut_where_its_tokens_run_out() -> None:
    """No end of sequence is forced on it: the answer ends for want of tokens, and says so."""
    tag = made("hermes").structural_tag(Asked(TOOLS))
    assert tag is not None
    matcher = begun(tag, 4)
    for byte in b"free":
        assert matcher.decide(byte) == byte and not matcher.forced
        matcher.consume(byte)
    matcher = begun(tag, 4)
    assert matcher.decide(TEXTS_OF["<tool_call>"]) == EOS  # no call would fit


@pytest.mark.parametrize(("name", "marker"), [("mistral", "[TOOL_CALLS]"), ("openai", "<|channel|>")])
def test_text_does_not_spell_a_marker_that_is_a_token(name: str, marker: str) -> None:
    """The reader would take it for one."""
    tag = made(name).structural_tag(Asked(TOOLS))
    assert tag is not None
    matcher, masks = begun(tag), np.zeros((1, 16), np.uint32)
    if name == "openai":
        for token in (SPECIAL["<|channel|>"], *b"final", SPECIAL["<|message|>"]):
            matcher.consume(token)
    for byte in marker.encode()[:-1]:
        matcher.consume(byte)
    COMPILER.fill_masks([matcher], masks)
    last = marker.encode()[-1]
    assert not masks[0, last // 32] >> np.uint32(last % 32) & 1 and masks[0, 3] >> np.uint32(ord("x") % 32) & 1


def test_reasoning_that_an_answer_needs_not_end_may_be_cut() -> None:
    fmt = made("hermes", "qwen3")
    tag = fmt.structural_tag(Asked(TOOLS, in_reasoning=True))
    assert tag is not None
    matcher = begun(tag, 3)
    for byte in b"hmm":
        assert matcher.decide(byte) == byte and not matcher.forced
        matcher.consume(byte)
    assert whole(fmt.parser(Asked(TOOLS, in_reasoning=True)), "hmm") == [Reasoning("hmm")]


@pytest.mark.parametrize("name", ANSWERS)
def test_many_tools_are_held(name: str) -> None:
    """As many as the server takes, with the longest schemas in all."""
    values = {f"value_{place}": {"type": "integer", "description": "d" * 90} for place in range(8)}
    tools = tuple(Tool(f"tool_{place}", {"type": "object", "properties": values}) for place in range(128))
    tag = made(name).structural_tag(Asked(tools))
    assert len(json.dumps(tools[0].schema)) * 128 > 120_000
    params = StructuredOutputsParams(structural_tag=tag)
    validate(source_of(params), params)


def test_a_tool_that_a_format_cannot_hold_is_refused() -> None:
    tool = Tool("f", {"type": "object", "properties": {"a": {}}, "minProperties": 1})
    with pytest.raises(InvalidRequestError, match="'f' must be an object"):
        made("hermes").structural_tag(Asked((Tool("f", {"type": "array"}),)))
    for name in ("qwen3_coder", "llama4_pythonic"):
        tag = made(name).structural_tag(Asked((tool,)))
        with pytest.raises(InvalidRequestError, match="'minProperties' cannot be held for named parameters"):
            source_of(StructuredOutputsParams(structural_tag=tag))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string"},
        {"type": "string", "maxLength": 9},
        {"type": "string", "maxLength": 5000},
        {"type": "string", "minLength": 1, "pattern": "^[ab]+$"},
        {"type": "string", "enum": ["a", 5]},
        {"type": "string", "enum": ["a", "</parameter>"]},
        {"type": "string", "const": "null"},
        {"enum": ["a", None]},
        {"type": "number"},
        True,
    ],
)
def test_a_text_is_read_in_the_way_in_which_it_is_held(schema: Any) -> None:
    """As it is, or as JSON: the schema alone says which."""
    parameters = {"type": "object", "properties": {"x": schema}, "required": ["x"]}
    asked = Asked((Tool("f", parameters),), must_call=True, parallel=False)
    tag = made("qwen3_coder").structural_tag(asked)
    assert tag is not None
    for seed in range(6):
        _, text = walked(begun(tag, 160), 160, seed)
        events = whole(made("qwen3_coder").parser(asked), text)
        arguments = "".join(one.text for one in events if isinstance(one, CallArguments))
        jsonschema_rs.validate(parameters, read_json(arguments))
