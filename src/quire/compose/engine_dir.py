"""What an engine directory fixes of the arguments."""

from dataclasses import replace
from typing import Any

from quire.config import GROUPED, EngineArgs
from quire.errors import ConfigurationError
from quire.outputs import Decision
from quire.weights.formats.engine_dir import Manifest

TREATED = ("bits", "calibration")
"""Decisions of a build that are shown at the start, too."""


def as_built(args: EngineArgs, manifest: Manifest | None) -> tuple[EngineArgs, list[Decision]]:
    """The arguments with what was decided when an engine was built, and a line about it. Where there is no engine, the
    arguments as they are.

    Raises:
        ConfigurationError: an argument asks for something else than what was built.
    """
    if manifest is None:
        return args, []
    fixed: dict[str, Any] = {"quantization": manifest.quantization, "dtype": manifest.dtype}
    if manifest.quantization in GROUPED:
        fixed["quantization_group_size"] = manifest.quantization_group_size
    for name, value in fixed.items():
        asked = getattr(args, name)
        if asked not in (None, "auto", value):
            text = f"{name} is {asked}; this engine was built with {value}: build another one from {manifest.model}"
            raise ConfigurationError(text, field=name)
    reason = f"built by quire {manifest.quire_version} from {manifest.model}; its weights are mapped"
    treated = [Decision(one.name, one.value, one.reason) for one in manifest.decisions if one.name in TREATED]
    engine = Decision("engine", f"{manifest.provider} {manifest.instruction_set}", reason)
    return replace(args, **fixed), [engine, *treated]
