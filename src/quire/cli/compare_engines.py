"""The engines that `quire compare` knows: how each is started, as a table."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quire.bench.peers import DRIVERS, Spec
from quire.bench.workloads import longest
from quire.errors import ConfigurationError

Settings = Mapping[str, Any]
GIB = 2**30
OURS = str(Path(__file__).parent / "compare_driver.py")
SERVER = str(DRIVERS / "server_driver.py")
IN_TRANSFORMERS = str(DRIVERS / "transformers_driver.py")


@dataclass(frozen=True, slots=True)
class Known:
    """One engine."""

    text: str
    driver: str
    extra: Callable[[str, Settings], dict[str, Any]] = lambda python, settings: {}
    """Further settings for its driver, from the interpreter that runs it and what is common to all."""
    reads_gguf: bool = False
    reads_checkpoint: bool = True
    reads_engine: bool = False
    """What `quire build` makes."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    whole_gib_on: tuple[str, ...] = ()
    """Devices on which its KV cache can only be of whole GiB."""


def _quire_server(python: str, settings: Settings) -> dict[str, Any]:
    flags = {
        "--port": "{port}",
        "--dtype": settings["dtype"],
        "--device": settings["device"],
        "--threads": settings["threads"],
        "--max-model-len": settings["max_model_len"],
        "--max-num-seqs": settings["max_num_seqs"],
        "--kv-cache-memory-bytes": settings["kv_bytes"],
    }
    command = [python, "-m", "quire", "serve", settings["model"], *(word for pair in flags.items() for word in pair)]
    version = [python, "-m", "quire", "--version"]
    return {"command": command, "version_command": version, "kv_told": settings["kv_bytes"]}


def _sglang(python: str, settings: Settings) -> dict[str, Any]:
    flags = {
        "--model-path": settings["model"],
        "--port": "{port}",
        "--dtype": settings["dtype"],
        "--device": settings["device"],
        "--context-length": settings["max_model_len"],
        "--max-running-requests": settings["max_num_seqs"],
        "--max-total-tokens": settings["kv_bytes"] // settings["kv_bytes_per_token"],
    }
    return {
        "command": [python, "-m", "sglang.launch_server", *(word for pair in flags.items() for word in pair)],
        "module": "sglang",
        "kv_told": settings["kv_bytes"],
        "version_command": [python, "-c", "import sglang; print(sglang.__version__)"],
    }


def _llama_cpp(binary: str, settings: Settings) -> dict[str, Any]:
    slot = settings["max_model_len"]
    fitting = settings["kv_bytes"] // (settings["kv_bytes_per_token"] * slot)
    slots = max(1, min(settings["max_num_seqs"], settings["most_requests"], fitting))
    flags = {"-m": settings["files"] or settings["model"], "-t": settings["threads"], "-tb": settings["threads"]}
    flags |= {"-np": slots, "-c": slots * slot, "--port": "{port}"}
    return {
        "command": [binary, *(word for pair in flags.items() for word in pair)],
        "version_command": [binary, "--version"],
        "kv_told": slots * slot * settings["kv_bytes_per_token"],
    }


KNOWN = {
    "quire": Known("its own process, LLM", OURS, reads_gguf=True, reads_engine=True),
    "quire-server": Known("quire serve, over HTTP", SERVER, _quire_server, reads_gguf=True, reads_engine=True),
    "transformers": Known("generate, static batches", IN_TRANSFORMERS, lambda *_: {"mode": "static"}),
    "transformers-continuous": Known(
        "its continuous batching (generate_batch)", IN_TRANSFORMERS, lambda *_: {"mode": "continuous"}
    ),
    "vllm": Known("in its process, LLMEngine", str(DRIVERS / "vllm_driver.py"), whole_gib_on=("cpu",)),
    "sglang": Known("its server, over HTTP", SERVER, _sglang),
    "llama.cpp": Known("llama-server, over HTTP", SERVER, _llama_cpp, reads_gguf=True, reads_checkpoint=False),
    "openvino": Known(
        "GenAI's continuous batching", str(DRIVERS / "openvino_driver.py"), devices=("cpu",), whole_gib_on=("cpu",)
    ),
}
DEFAULT = [name for name in KNOWN if name != "quire-server"]


@dataclass(frozen=True, slots=True)
class Given:
    """What a user said of single engines, by their names."""

    python: Mapping[str, str] = field(default_factory=dict)
    """Interpreters; of llama.cpp its llama-server."""
    files: Mapping[str, str] = field(default_factory=dict)
    """The same weights in a form that an engine reads."""
    url: Mapping[str, str] = field(default_factory=dict)
    """Servers that run already, by names of the user's own."""
    driver: Mapping[str, str] = field(default_factory=dict)
    """Drivers' files for further engines, by names of the user's own."""
    environment: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def unfit(name: str, settings: Settings, given: Given) -> str | None:
    """Why an engine cannot be compared on this model and device, as far as it is known before it starts."""
    if name not in KNOWN:
        return None
    known, model = KNOWN[name], Path(settings["model"])
    is_gguf = model.is_file()
    if settings["device"] not in known.devices:
        return f"it runs on {' and '.join(known.devices)}, this is {settings['device']}"
    if settings["device"] in known.whole_gib_on and settings["kv_bytes"] % GIB:
        mib = settings["kv_bytes"] / 2**20
        return f"its KV cache is of whole GiB, this is {mib:,.1f} MiB: name such with --kv-cache-memory-bytes"
    if name in given.files:
        return None
    if is_gguf and not known.reads_gguf:
        return f"it does not read {model.name}, a GGUF file, as it is: name a checkpoint directory"
    if (model / "engine.json").is_file() and not known.reads_engine:
        return f"it does not read {model.name}, an engine of quire build: name the checkpoint"
    if not is_gguf and not known.reads_checkpoint:
        return "it reads GGUF alone: --files llama.cpp=FILE.gguf names the same weights"
    return None


def spec(name: str, settings: Settings, given: Given) -> Spec:
    """How an engine is started with the settings that all share."""
    own = {**settings, "name": name, "files": given.files.get(name)}
    if name in given.url:
        url = given.url[name]
        own |= {"url": url if "://" in url else f"http://{url}", "processors": []}
        return Spec(name, SERVER, sys.executable, own, given.environment.get(name, {}))
    if name in given.driver:
        program = given.python.get(name) or sys.executable
        return Spec(name, given.driver[name], program, own, given.environment.get(name, {}))
    known = KNOWN[name]
    program = given.python.get(name) or ("llama-server" if name == "llama.cpp" else sys.executable)
    driven_by = sys.executable if name == "llama.cpp" else program
    return Spec(name, known.driver, driven_by, own | known.extra(program, own), given.environment.get(name, {}))


def processors(threads: int, cores: Sequence[Sequence[int]]) -> list[int]:
    """One for each thread: first one of each physical core, then their siblings; none where there are too few."""
    order = [core[place] for place in range(max(map(len, cores))) for core in cores if place < len(core)]
    return order[:threads] if threads <= len(order) else []


def pairs(items: Sequence[str], flag: str, known: Sequence[str] | None) -> dict[str, str]:
    """`NAME=VALUE` words; `known`: the names that there are.

    Raises:
        ConfigurationError: naming the flag.
    """
    found = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name or not value or (known is not None and name not in known):
            names = f" with a NAME of {', '.join(known)}" if known is not None else ""
            raise ConfigurationError(f"{flag} must be NAME=VALUE{names}, got {item[:80]!r}", field=flag)
        found[name] = value
    return found


def shape(workloads: Mapping[str, Sequence[Any]]) -> tuple[int, int]:
    """Tokens of the longest request, rounded up to 256, and the most requests at once."""
    tokens = max(longest(list(items)) for items in workloads.values())
    return -(-tokens // 256) * 256, max(map(len, workloads.values()))
