"""One declaration a field: what is declared is parsed, described and on the page, and nothing else is."""

from dataclasses import fields
from typing import Annotated, Any

import msgspec
import pytest

from quire.errors import InvalidRequestError
from quire.sampling_params import SamplingParams
from quire.server.doors.openai.bodies import CHAT, COMPLETION, TOKENIZE_CHAT, request_bodies
from quire.server.http.errors import ApiError
from quire.server.http.limits import Limits
from quire.server.http.schema import Field, Flattened, Refused, RequestSchema
from scripts import api_pages

LIMITS = Limits()


def test_every_sampling_parameter_is_a_field() -> None:
    """A parameter without a declaration would be unknown to both routes."""
    own = {"detokenize", "output_kind"}
    for schema in (COMPLETION, CHAT):
        assert {item.name for item in fields(SamplingParams)} - own <= set(schema.fields)
        assert not own & set(schema.known())


class Part(msgspec.Struct, forbid_unknown_fields=True):
    word: Annotated[str, Field("a word", "be a word")]
    count: Annotated[int, Field("how often")] = 1
    old: Annotated[Annotated[str, msgspec.Meta(max_length=0)] | None, Refused("it is gone")] = None


class Inner(msgspec.Struct):
    parts: Annotated[list[Part], Field("parts", limit="messages")]
    first: Annotated[Part | None, Field("one part")] = None


class Outer(msgspec.Struct):
    inner: Annotated[Inner, Flattened()]
    rest: Annotated[dict[str, Any], Flattened({"size": Field("checked elsewhere", aliases=("length",))})]
    flag: Annotated[bool, Field("a flag")] = False


SCHEMA = RequestSchema(Outer)
PART = {"word": "a"}


def test_fields_of_a_part_stand_in_the_body() -> None:
    found = SCHEMA.read({"parts": [PART], "length": 7, "flag": None}, LIMITS)
    assert (found.inner.parts[0].word, found.rest, found.flag) == ("a", {"size": 7}, False)


@pytest.mark.parametrize(
    ("body", "param", "text"),
    [
        ({}, "parts", "parts is required and must be of another type"),
        ({"parts": 5}, "parts", "parts must be of another type"),
        ({"parts": [5]}, "parts[0]", "parts[0] must be an object"),
        ({"parts": [PART, {}]}, "parts[1].word", "parts[1].word is required and must be a word"),
        ({"parts": [{"word": 5}]}, "parts[0].word", "parts[0].word must be a word"),
        ({"parts": [{**PART, "count": True}]}, "parts[0].count", "parts[0].count must be a whole number"),
        ({"parts": [{**PART, "cuont": 1}]}, "parts[0].cuont", "unknown field 'parts[0].cuont'; did you mean 'parts[0]"),
        ({"parts": [{**PART, "old": "x"}]}, "parts[0].old", "parts[0].old is not supported: it is gone"),
        ({"parts": [PART], "first": {"word": 1}}, "first", "first.word must be a word"),
        ({"parts": [PART], "first": {"wrd": 1}}, "first", "unknown field 'first.wrd'; did you mean 'first.word'?"),
        ({"parts": [PART], "flag": 1}, "flag", "flag must be true or false"),
        ({"parts": [PART], "flga": 1}, "flga", "unknown field 'flga'; did you mean 'flag'?"),
        ({"parts": [PART], "size": 1, "length": 2}, "length", "length and size are one field and differ"),
        ({"parts": [PART], "` - at `$.flag`": 1}, "` - at `$.flag`", "unknown field '` - at `$.flag`'"),
        ({"parts": [{**PART, "` - at `$.flag`": 1}]}, "parts[0].` - at `$.flag`", "unknown field"),
    ],
)  # fmt: skip
def test_a_refusal_says_what_and_where(body: dict[str, Any], param: str, text: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SCHEMA.read(body, LIMITS)
    assert caught.value.param == param
    assert caught.value.message.startswith(text)


def test_a_limit_stands_in_schema_and_parser() -> None:
    limits = LIMITS.with_values({"messages": 2, "content_parts": 3})
    assert SCHEMA.json_schema(limits)[0]["properties"]["parts"]["maxItems"] == 2
    SCHEMA.read({"parts": [PART] * 2}, limits)
    with pytest.raises(ApiError) as caught:
        SCHEMA.read({"parts": [PART] * 3}, limits)
    assert caught.value.code == "too_many_messages"
    (parts,) = (
        form for form in request_bodies(limits)["Message"]["properties"]["content"]["anyOf"] if form["type"] == "array"
    )
    assert parts["maxItems"] == 3


def test_each_declared_field_is_described_under_each_of_its_names() -> None:
    for schema in (COMPLETION, CHAT, TOKENIZE_CHAT):
        properties = schema.json_schema(LIMITS)[0]["properties"]
        assert sorted(properties) == schema.known()
        assert all(
            item["description"] or item["anyOf"][0]["description"] for item in properties.values() if "enum" in item
        )


def test_the_page_of_the_api_is_what_the_declarations_say(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["api_pages", "--check"])
    assert api_pages.main() == 0
    monkeypatch.setattr(api_pages, "ROW", "{}\n")
    assert api_pages.main() == 1
