"""YAML by a schema, sampled: masks hold what may come, and answers by chance close, are read alike and validate."""

import json
import random
from typing import Any

import jsonschema_rs
import numpy as np
import pytest

from quire.core.request import GrammarSpec
from quire.errors import InvalidRequestError
from quire.structured.checker import ShapeChecker
from quire.structured.compiler import GrammarCompiler, Vocabulary
from quire.structured.source import source_of, validate
from quire.structured.unique import UniqueKeys
from quire.structured_params import StructuredOutputsParams
from tests.structured.test_closing import SCHEMAS
from tests.structured.yaml_texts import Unlike, read

TEXT = {"type": "string"}
TOKENS = [bytes((byte,)) for byte in range(256)] + [
    *(b"<end>", b'":', b'": ', b'", "', b"a:", b"a: 1", b"\n  ", b"\n    ", b"- ", b'"a"', b'{"', b"  a:"),
    *(b"\n- a: ", b"1\na: "),
    *(b'", "a": ', b'"a": 1', b": ", b"aa", b'a": ', b"no", b"|-\n", b"[]", b"{}"),
]
END = 256


def encode(text: str) -> list[int]:
    """The longest tokens that fit, one after the other."""
    data, found = text.encode(), []
    while data:
        fitting = (one for one in range(len(TOKENS)) if one != END and data.startswith(TOKENS[one]))
        best = max(fitting, key=lambda one: len(TOKENS[one]))
        found.append(best)
        data = data[len(TOKENS[best]) :]
    return found


def answer(grammars: GrammarCompiler, spec: GrammarSpec, rng: random.Random, name: str) -> str:
    """At each place a token by chance, those of syntax more often, as the sampler takes them."""
    following, found = grammars.matcher(name, spec), []
    masks = np.zeros((1, -(-len(TOKENS) // 32)), np.uint32)
    while not found or found[-1] != END:
        if following.forced:
            token_id = following.forced[0]
        else:
            grammars.fill_masks([following], masks)
            following.check()
            allowed = np.flatnonzero(np.unpackbits(masks.view(np.uint8), bitorder="little")).tolist()
            special = [one for one in allowed if one >= END or chr(one) in '\n :"-[]{},|a1']
            token_id = following.decide(rng.choice(special if special and rng.random() < 0.6 else allowed))
        following.consume(token_id)
        found.append(token_id)
    assert len(found) <= spec.max_tokens
    return b"".join(TOKENS[one] for one in found[:-1]).decode()


def test_masks_hold_what_may_come_and_no_key_twice() -> None:
    """At every place of these texts, for every token, those of several characters among them."""
    shape: Any = {"type": "object", "properties": {"f": {"$ref": "#/$defs/8"}}}
    shape["$defs"] = {
        str(n): {"type": "object", "properties": {"f": {"$ref": f"#/$defs/{n - 1}"}}} for n in range(1, 9)
    }
    shape["$defs"]["0"] = {}
    vocabulary = Vocabulary(TOKENS, special_token_ids=(END,), eos_token_ids=(END,), encode=encode)
    source = source_of(StructuredOutputsParams(yaml=shape))
    num_masked = 0
    for text in (
        "a: 1\naa: 2\nno: x",
        'aa: 1\n"a": "a: b"\n"a b": x',
        "".join("  " * depth + "f:\n" for depth in range(7)) + "  " * 7 + 'f: {"a": 1, "aa": [{"a": 2}, 1], "b": 3}',
        "a:\n  - a: 1\n    aa: 1\n  - aa: |-\n      a: 1\n      a: 1\n    a: 1\naa: 1",
    ):
        following = GrammarCompiler(lambda: vocabulary).matcher("0", GrammarSpec(source, 10**6)).inner
        assert isinstance(following, UniqueKeys)
        for token_id in text.encode():
            mask, raw = (
                np.unpackbits(np.frombuffer(one.compute_bitmask(), np.uint8), bitorder="little")
                for one in (following, following.raw)
            )
            for other in range(len(TOKENS)):
                if other != END and raw[other]:
                    assert mask[other] == following.validate_tokens([other]), (text, TOKENS[other])
                    num_masked += not mask[other]
            assert not (mask & ~raw & 1).any()
            if not following.try_consume_tokens([token_id]):
                break
    assert num_masked > 20


def test_the_shortest_answer_is_short() -> None:
    vocabulary = Vocabulary(TOKENS, special_token_ids=(END,), eos_token_ids=(END,), encode=encode)
    closed: Any = {"type": "object", "required": ["b"], "additionalProperties": False}
    inner = {**closed, "properties": {"a": TEXT, "b": {"enum": ["left"]}}}
    for schema, text in (
        (SCHEMAS["nested"], "- x: left\n- x: left"),
        (SCHEMAS["unequal"], "none: true"),
        ({**closed, "properties": {"a": {}, "b": inner}}, "b:\n  b: left"),
        (
            {"type": "object", "additionalProperties": {"type": "array", "minItems": 1}, "minProperties": 2},
            "_:\n  - 0\na:\n  - 0",
        ),
    ):
        shortest = GrammarCompiler(lambda: vocabulary).shortest(source_of(StructuredOutputsParams(yaml=schema)))
        assert shortest is not None and b"".join(TOKENS[one] for one in shortest).decode() == text


def schemas(rng: random.Random, depth: int = 3) -> Any:
    """A schema by chance, of what is held."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "text", "any"]
    kind = rng.choice(kinds + (["array", "object", "map", "union", "tuple", "pattern"] * 2 if depth else []))
    inner = lambda: schemas(rng, depth - 1)  # noqa: E731 - it is short
    names = rng.sample(["a", "no", "a b", "é", "1", "null", "x-y", "", "long name", "a:b", "#"], rng.randint(1, 4))
    least = rng.randint(0, 3)
    match kind:
        case "enum":
            return {"enum": rng.sample(["a", "no", 1, 2.5, None, True, "1e3", "", ["a"], {"no": {}}, [], "a\nb"], 4)}
        case "text":
            said = [{"minLength": 2, "maxLength": 9}, {"pattern": "^[a-z0-9:]+$"}, {"format": "date"}]
            return {"type": "string", **rng.choice(said)}
        case "any":
            return rng.choice([{}, True, {"type": ["string", "null", "array"]}])
        case "array":
            return {"type": "array", "items": inner(), "minItems": least, "maxItems": least + rng.randint(0, 3)}
        case "tuple":
            return {"type": "array", "prefixItems": [inner(), inner()], "items": inner(), "minItems": least}
        case "map":
            return {"type": "object", "additionalProperties": inner(), "minProperties": least}
        case "pattern":
            patterns, others = {rng.choice(["^[a-c]$", "^[a-z]+$", "^x-", "a"]): inner()}, rng.choice([False, inner()])
            return {"type": "object", "patternProperties": patterns, "additionalProperties": others}
        case "object":
            required = rng.sample(names, rng.randint(0, len(names)))
            closed = rng.choice([{}, {"additionalProperties": False}])
            return {"type": "object", "properties": {name: inner() for name in names}, "required": required, **closed}
        case "union":
            return {"anyOf": [inner(), inner(), {"type": "null"}]}
        case "integer" | "number":
            return {"type": kind, **rng.choice([{}, {"minimum": -3}, {"minimum": 10, "maximum": 2000}])}
    return {"type": kind}


def check_answers(schema: Any, seed: int, num_answers: int) -> int:
    """Returns how many were judged."""
    params = StructuredOutputsParams(yaml=json.dumps(schema))
    try:
        source = source_of(params)
        validate(source, params)
    except InvalidRequestError:
        return 0
    vocabulary = Vocabulary(TOKENS, special_token_ids=(END,), eos_token_ids=(END,), encode=encode)
    grammars, rng = GrammarCompiler(lambda: vocabulary), random.Random(seed)
    shortest = grammars.shortest(source)
    assert shortest is not None, schema
    for number in range(num_answers):
        more = number if number < 6 else rng.randrange(300)
        text = answer(grammars, GrammarSpec(source, len(shortest) + 1 + more), rng, str(number))
        try:
            jsonschema_rs.validate(schema, read(text))
        except (Unlike, jsonschema_rs.ValidationError) as error:
            raise AssertionError((schema, text)) from error
    return num_answers


@pytest.mark.parametrize("name", SCHEMAS)
def test_answers_by_chance_close_and_validate(name: str) -> None:
    assert check_answers(SCHEMAS[name], 1, 16)


def test_answers_by_chance_to_schemas_by_chance() -> None:
    rng = random.Random(5)
    assert sum(check_answers(schemas(rng), seed, 8) for seed in range(40)) > 250


@pytest.mark.parametrize(
    "pattern", ["^[ab]$|^x+$", "^[a-c]{1,2}$", "^(a|b)$", "^a?$", "^(no|yes)$", "^[A]$|^b", "^..$"]
)
def test_few_keys_leave_no_place_without_a_token(pattern: str) -> None:
    """Every key that may come is written, each once; what follows the last is the end."""
    schema = {"type": "object", "patternProperties": {pattern: {"const": 1}}, "additionalProperties": False}
    assert check_answers({**schema, "minProperties": 2}, 3, 40) or pattern == "^a?$"
    assert check_answers(schema, 4, 40)


def test_long_objects_exhaust_no_stack() -> None:
    """Neither of the process that checks, nor of the thread that compiles."""
    names = {f"p{number}": {"type": "null"} for number in range(890)}
    checker = ShapeChecker()
    try:
        source = checker.source(StructuredOutputsParams(yaml={"properties": names, "type": "object"}))
        with pytest.raises(InvalidRequestError, match="more than 900 keys any of which"):
            more = {f"p{number}": {"type": "null"} for number in range(901)}
            checker.source(StructuredOutputsParams(yaml={"properties": more, "type": "object"}))
    finally:
        checker.close()
    vocabulary = Vocabulary(TOKENS, special_token_ids=(END,), eos_token_ids=(END,), encode=encode)
    assert GrammarCompiler(lambda: vocabulary).shortest(source) is not None
