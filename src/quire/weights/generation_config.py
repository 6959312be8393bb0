"""What a model's files say about generation: the ids that end it, and the default sampling parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from quire.errors import InvalidRequestError, ModelFileError
from quire.sampling_params import SamplingParams
from quire.weights.formats.gguf_names import header_path
from quire.weights.json_file import read_json_object

if TYPE_CHECKING:
    from quire.weights.formats.gguf_parts import GgufParts

MAX_BYTES = 2**20

_SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""transformers' name -> vLLM's; the same keys that vLLM takes from `generation_config.json`."""


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """`sampling` has vLLM's names; each value is one that `SamplingParams` takes."""

    eos_token_ids: tuple[int, ...]
    sampling: Mapping[str, int | float]


def load_generation_defaults(path: Path, known: "GgufParts | None" = None) -> GenerationDefaults:
    """From `generation_config.json`, and `config.json` for what that one does not say; or from a GGUF header.

    Args:
        known: of a GGUF file, its headers, if they were read.

    Raises:
        ModelFileError: a file is damaged, or a value has a wrong type or is out of range.
    """
    header = header_path(path)
    return _of_directory(path) if header is None else _of_header(header, known)


def _of_header(path: Path, known: "GgufParts | None") -> GenerationDefaults:
    # Not above: it brings numpy, which the side that knows text can do without.
    from quire.weights.formats.gguf_generation import generation_settings, stop_token_ids
    from quire.weights.formats.gguf_parts import GgufParts

    with GgufParts(path, known) as parts:
        ids = stop_token_ids(parts.name, parts.values)
        sampling = _sampling(generation_settings(parts.values), parts.name)
    return GenerationDefaults(tuple(ids), MappingProxyType(sampling))


def _of_directory(directory: Path) -> GenerationDefaults:
    path = directory / "generation_config.json"
    generation = read_json_object(path, MAX_BYTES) if path.exists() else {}
    config = read_json_object(directory / "config.json", 4 * MAX_BYTES)
    text = config.get("text_config")
    inner = text if isinstance(text, dict) else {}
    sources = [(path.name, generation), ("config.json", config), ("config.json", inner)]
    return GenerationDefaults(
        eos_token_ids=_ids("eos_token_id", sources),
        sampling=MappingProxyType(_sampling(generation, path.name)),
    )


def _sampling(generation: Mapping[str, Any], file: str) -> dict[str, int | float]:
    found = {
        ours: _number(theirs, generation[theirs], file)
        for theirs, ours in _SAMPLING.items()
        if generation.get(theirs) is not None
    }
    # transformers writes only what differs from the default: a stated false means that the model is meant to be greedy.
    return {**found, "temperature": 0.0} if generation.get("do_sample") is False else found


def _ids(name: str, sources: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[int, ...]:
    """From the first of the files that names any."""
    file, value = next(
        ((file, source[name]) for file, source in sources if source.get(name) not in (None, [])), ("", [])
    )
    ids = value if isinstance(value, list) else [value]
    if any(type(item) is not int or not 0 <= item < 2**31 for item in ids):
        raise ModelFileError(f"{file}: {name} must be a token id or a list of them")
    return tuple(ids)


def _number(name: str, value: Any, file: str) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ModelFileError(f"{file}: {name} must be a number, got {str(value)[:60]}")
    parameter: dict[str, Any] = {_SAMPLING[name]: value}
    try:
        SamplingParams(**parameter)
    except InvalidRequestError as error:
        raise ModelFileError(f"{file}: {name}: {error.message}") from None
    return value
