"""Tokenizers whose parts lengthen a text without end are refused before anything is built from them."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from quire.errors import ModelFileError
from quire.text.growth import MAX_GROWTH, check_growth
from quire.text.tokenizer import Tokenizer
from tests.text.small_tokenizers import KINDS, byte_level, write_directory


def replace(old: str, new: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: old}, "content": new}


def charsmap(text: bytes) -> dict[str, Any]:
    blob = (4).to_bytes(4, "little") + bytes(4) + b"ab\0" + text + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(blob).decode()}


SEQUENCE = {"single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2, "pair": [], "special_tokens": {}}
ENDLESS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "replace": ("normalizer", "normalizers", replace("a", "aa")),
    "a regular expression": ("normalizer", "normalizers", replace("", "a", "Regex")),
    "an empty pattern": ("normalizer", "normalizers", replace("", "a")),
    "prepend": ("normalizer", "normalizers", {"type": "Prepend", "prepend": "ab"}),
    "charsmap": ("normalizer", "normalizers", charsmap(b"aa")),
    "bytes": ("pre_tokenizer", "pretokenizers", {"type": "ByteLevel", "add_prefix_space": False}),
    "decoder": ("decoder", "decoders", replace("a", "aa")),
    "template": ("post_processor", "processors", {"type": "TemplateProcessing", **SEQUENCE}),
}


@pytest.mark.parametrize("name", ENDLESS)
@pytest.mark.parametrize("nested", [False, True])
def test_what_doubles_a_text_forty_times_is_refused(name: str, nested: bool, tmp_path: Path) -> None:
    part, inner, step = ENDLESS[name]
    steps = [{"type": "Sequence", inner: [step] * 8}] * 5 if nested else [step] * 40
    path = write_directory(tmp_path, byte_level())
    state = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    state |= {part: {"type": "Sequence", inner: steps}}
    (path / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(ModelFileError, match=rf"tokenizer\.json: {part} has \d+ steps that may lengthen a text"):
        Tokenizer.from_directory(path)


def test_the_bounds_are_met_exactly() -> None:
    def of(*steps: dict[str, Any]) -> str:
        return json.dumps({"normalizer": {"type": "Sequence", "normalizers": steps}})

    check_growth(of(replace("a", "b" * MAX_GROWTH)))
    check_growth(of(*[replace("a", "bb")] * 10, *[replace("ab", "bb")] * 200))
    for steps in ([replace("a", "b" * (MAX_GROWTH + 1))], [replace("a", "bb")] * 11, [replace("a", "b")] * 257):
        with pytest.raises(ModelFileError, match="normalizer"):
            check_growth(of(*steps))


def test_a_part_is_found_however_the_file_spells_it() -> None:
    """The last of two counts, as for the library; a name may be written with escapes."""
    steps = json.dumps({"type": "Sequence", "normalizers": [replace("a", "aa")] * 40})
    with pytest.raises(ModelFileError, match="normalizer"):
        check_growth(f'{{"normalizer": null, "\\u006eormalizer": {steps}}}')
    check_growth(f'{{"model": {{"normalizer": {steps}}}, "normalizer": null}}')


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_of_language_models_are_far_below(kind: str) -> None:
    check_growth(KINDS[kind]().to_str())
