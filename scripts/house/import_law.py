"""Who may import whom: the table of the design, as data. `imports.py` reads the tree against it.

A name stands for that module of `quire` and everything below it. Every room may import itself.
"""

from dataclasses import dataclass

ROOT_VALUES = frozenset({"sampling_params", "structured_params", "outputs", "errors", "config"})
COMPOSERS = frozenset({"", "__main__", "cli", "compose", "llm"})
"""The only places that compose: they may import any public name. `""` is `quire/__init__.py`."""

BASE = frozenset(
    (
        "array_api_compat huggingface_hub jinja2 llguidance ml_dtypes msgspec numpy starlette tokenizers tqdm uvicorn"
    ).split()
)
"""What the base install promises, by import name: `dependencies` in pyproject.toml."""
TRANSITIVE = frozenset({"anyio"})
"""What Starlette itself is made of."""


@dataclass(frozen=True)
class Room:
    """What a folder (or a root module) may import: own modules, and third-party packages."""

    own: frozenset[str] = frozenset()
    third_party: frozenset[str] = frozenset()
    optional: bool = True
    """May import, inside a function, a package that the base install lacks (torch, say)."""


def _room(own: str = "", third_party: str = "", *, root: bool = True, optional: bool = True) -> Room:
    names = frozenset(own.split()) | (ROOT_VALUES if root else frozenset())
    return Room(names, frozenset(third_party.split()), optional)


LAW: dict[str, Room] = {
    **dict.fromkeys(ROOT_VALUES, _room("", "msgspec", optional=False)),
    "core": _room("", "", optional=False),
    "text": _room("", "jinja2 msgspec tokenizers"),
    "structured": _room("", "llguidance numpy"),
    "ops": _room("", "array_api_compat ml_dtypes numpy"),
    "ops.cuda": _room("ops", "array_api_compat ml_dtypes numpy torch triton"),
    "quant": _room("ops", "ml_dtypes numpy"),
    "models": _room("ops.types quant.types", "ml_dtypes msgspec numpy"),
    "weights": _room("models quant ops", "huggingface_hub ml_dtypes msgspec numpy tqdm"),
    "plan": _room("models quant ops weights", "msgspec numpy"),
    "build": _room("models quant ops weights", "msgspec numpy"),
    "sampling": _room("ops core.plan core.request", "ml_dtypes numpy"),
    "runner": _room("ops quant models weights sampling core.plan", "ml_dtypes msgspec numpy"),
    "executor": _room("runner core.plan", "msgspec"),
    "engine": _room("core text", "tqdm"),
    "isolation": _room("core engine", "msgspec"),
    "observe": _room("core engine"),
    "server": _room("engine", "anyio msgspec starlette uvicorn"),
    "server.http": _room("engine", "anyio msgspec starlette uvicorn"),
    "bench": _room("engine", "msgspec numpy tqdm"),
    "course": _room("core observe ops", "array_api_compat numpy"),
    "demo": _room(),
    "programs": _room("engine"),
    "cli.chat_rich": _room("cli.chat_session cli.chat_terminal cli.history", "prompt_toolkit rich"),
}
"""By folder; `ops.cuda` is a room inside a room, and the longest name wins."""

PURE = "core"
FORBIDDEN_BELOW_PURE = frozenset(
    (
        "numpy torch transformers time datetime socket asyncio selectors ssl http urllib threading "
        "multiprocessing subprocess concurrent"
    ).split()
)
"""`core` reaches none of these by any path: integers only, and time arrives as an argument."""
