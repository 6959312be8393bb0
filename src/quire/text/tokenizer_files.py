"""Reading the files of a tokenizer from a model's directory."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from quire.errors import ModelFileError
from quire.text.growth import check_growth

_MAX_TOKENIZER_BYTES = 256 << 20
_MAX_FILE_BYTES = 32 << 20
_LFS_POINTER = "version https://git-lfs.github.com/spec/"
_COMMON_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What a directory says about its tokenizer, each part checked for its type."""

    backend: tokenizers.Tokenizer
    named_tokens: Mapping[str, str]  # bos_token, eos_token, ...: the variables of chat templates
    templates: Mapping[str, str]  # by name; the main one is "default"


def is_panic(error: BaseException) -> bool:
    """Whether a native library panicked: pyo3 raises that as a `BaseException`, of a class that it does not export."""
    return type(error).__name__ == "PanicException"


def read_tokenizer_files(directory: Path) -> TokenizerFiles:
    """Read a directory. Raises `ModelFileError`, which names the file."""
    backend = _read_backend(directory)
    config = _read_json(directory, "tokenizer_config.json")
    if "added_tokens_decoder" not in config:  # the older form keeps special tokens in a file of their own
        config |= _read_json(directory, "special_tokens_map.json")
    named = _named_tokens(config)
    _add_tokens(backend, config, named)
    if config.get("split_special_tokens") is True:
        backend.encode_special_tokens = True
    return TokenizerFiles(
        backend=backend,
        named_tokens={name: token.content for name, token in named.items()},
        templates=_read_templates(directory, config),
    )


def _read_backend(directory: Path) -> tokenizers.Tokenizer:
    text = _read_text(directory / "tokenizer.json", _MAX_TOKENIZER_BYTES)
    if text is None:
        raise ModelFileError("tokenizer.json is missing: this directory has no tokenizer that Quire reads")
    check_growth(text)
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise ModelFileError(f"tokenizer.json cannot be read: {str(error)[:200]}") from None
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_text(path: Path, max_bytes: int) -> str | None:
    """The file's text, or None where there is no such file."""
    try:
        if not path.is_file():
            return None
        if path.stat().st_size > max_bytes:
            raise ModelFileError(f"{path.name} is larger than {max_bytes >> 20} MB")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelFileError(f"{path.name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ModelFileError(f"{path.name} is not UTF-8 text") from None
    if text.startswith(_LFS_POINTER):
        raise ModelFileError(f"{path.name} is a Git LFS pointer, not the file itself; `git lfs pull` fetches it")
    return text


def _read_json(directory: Path, name: str) -> dict[str, Any]:
    """An optional JSON object; empty where the file is missing."""
    text = _read_text(directory / name, _MAX_FILE_BYTES)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise ModelFileError(f"{name} is not valid JSON") from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{name} does not hold a JSON object")
    return value


def _as_token(value: Any, *, special: bool) -> tokenizers.AddedToken | None:
    """An added token as the files write it: a string, or an object with its flags."""
    if isinstance(value, str):
        return tokenizers.AddedToken(value, special=special)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        return None
    flags = {name: value[name] is True for name in ("lstrip", "rstrip", "single_word", "normalized") if name in value}
    return tokenizers.AddedToken(value["content"], special=special or value.get("special") is True, **flags)


def _named_tokens(config: Mapping[str, Any]) -> dict[str, tokenizers.AddedToken]:
    """`bos_token`, `eos_token`, `image_token` and the like, with their flags."""
    names = [*_COMMON_TOKENS, *(name for name in config if name.endswith("_token") and name not in _COMMON_TOKENS)]
    values = {name: config.get(name) for name in names}
    if isinstance(config.get("extra_special_tokens"), dict):
        values |= config["extra_special_tokens"]
    tokens = {name: _as_token(value, special=True) for name, value in values.items()}
    return {name: token for name, token in tokens.items() if token is not None}


def _add_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, tokenizers.AddedToken]
) -> None:
    """Add what the configuration names, in the order of `transformers`: its flags win over those of tokenizer.json.

    Where it lists no tokens, those of tokenizer.json keep their flags. In either list a named token is special.
    """
    by_id = config.get("added_tokens_decoder", {})
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    if not isinstance(by_id, dict) or not all(str(key).isdecimal() for key in by_id):
        raise ModelFileError("tokenizer_config.json: added_tokens_decoder does not map ids to tokens")
    listed = [_as_token(by_id[key], special=False) for key in sorted(by_id, key=int)]
    wanted = [token for token in listed if token is not None] if "added_tokens_decoder" in config else [*known.values()]
    names = {token.content for token in named.values()}
    for token in wanted:
        # The library goes on hiding a token that was special once, whatever is said of it later.
        was_special = token.content in known and known[token.content].special
        token.special = token.special or was_special or token.content in names
    contents = {*known, *(token.content for token in wanted)}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    others = [*named.values(), *(_as_token(value, special=True) for value in extra if isinstance(extra, list))]
    # One call: each rebuilds the search for all added tokens.
    backend.add_tokens([*wanted, *(token for token in others if token is not None and token.content not in contents)])


def _read_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name: files of their own come before those inside tokenizer_config.json."""
    templates: dict[str, str] = {}
    main = _read_text(directory / "chat_template.jinja", _MAX_FILE_BYTES)
    if main is not None:
        templates["default"] = main
    folder = directory / "additional_chat_templates"
    if folder.is_dir():
        for path in sorted(folder.glob("*.jinja")):
            templates[path.stem] = _read_text(path, _MAX_FILE_BYTES) or ""
    if templates:
        return templates
    inline = _read_json(directory, "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(inline, str):
        return {"default": inline}
    if isinstance(inline, list) and all(isinstance(item, dict) for item in inline):
        inline = {item.get("name"): item.get("template") for item in inline}
    if inline is None:
        return {}
    if not isinstance(inline, dict) or not all(isinstance(text, str) for pair in inline.items() for text in pair):
        raise ModelFileError("tokenizer_config.json: chat_template is neither a text nor a list of named texts")
    return inline
