"""`quire show`: what of a model is in the hub's cache on this machine."""

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from quire.cli.list import size_of

if TYPE_CHECKING:
    from quire.weights.local_models import LocalModel

EXAMPLES = """examples:
  quire show owner/name
  quire show owner/name:v2 --json

`quire inspect` says what is inside the model itself."""
SHOWN = ("model_type", "max_position_embeddings", "vocab_size", "dtype", "torch_dtype")
"""Of config.json."""


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("name", metavar="NAME", help="a model of `quire list`, maybe with :revision")
    parser.add_argument("--json", action="store_true", help="one JSON list")


def run(options: argparse.Namespace) -> int:
    """Print each revision with its files."""
    from quire.weights.local_models import LocalModels

    found = LocalModels().find(options.name)
    if options.json:
        print(json.dumps([_facts(one) for one in found]))
        return 0
    for one in found:
        print("\n".join(_lines(one)))
    return 0


def _facts(one: "LocalModel") -> dict[str, Any]:
    config = next((file.path for file in one.files if file.name == "config.json"), None)
    stated: Any = {} if config is None else json.loads(config.read_text(encoding="utf-8"))
    return {
        "id": one.id,
        "commit": one.commit,
        "revisions": one.revisions,
        "size_bytes": one.size_bytes,
        "directory": str(one.directory),
        "config": {name: stated[name] for name in SHOWN if isinstance(stated, dict) and name in stated},
        "files": {file.name: file.size_bytes for file in one.files},
    }


def _lines(one: "LocalModel") -> Iterator[str]:
    facts = _facts(one)
    yield f"{one.id} {one.revision}"
    yield f"  commit     {one.commit}"
    yield f"  revisions  {', '.join(one.revisions) or 'none'}"
    yield f"  size       {size_of(one.size_bytes)}"
    yield f"  directory  {one.directory}"
    for name, value in facts["config"].items():
        yield f"  {name:<10} {value}"
    for file in one.files:
        yield f"  {size_of(file.size_bytes):>10}  {file.name}"
