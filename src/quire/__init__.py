"""Quire: an inference engine for large language models. A paged KV cache, continuous batching, an
OpenAI-compatible server; small, ready at once, the same on every run.

The names below are loaded when they are first used, so that `import quire` costs nothing.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from quire.config import EngineArgs
    from quire.llm import LLM, AsyncLLM
    from quire.outputs import CompletionOutput, Logprob, RequestOutput
    from quire.programs.program import program
    from quire.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
    from quire.structured_params import StructuredOutputsParams

_HOME = {
    "LLM": "quire.llm",
    "AsyncLLM": "quire.llm",
    "EngineArgs": "quire.config",
    "SamplingParams": "quire.sampling_params",
    "BeamSearchParams": "quire.sampling_params",
    "RequestOutputKind": "quire.sampling_params",
    "StructuredOutputsParams": "quire.structured_params",
    "RequestOutput": "quire.outputs",
    "CompletionOutput": "quire.outputs",
    "Logprob": "quire.outputs",
    "program": "quire.programs.program",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchParams",
    "CompletionOutput",
    "EngineArgs",
    "Logprob",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
    "program",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'quire' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
