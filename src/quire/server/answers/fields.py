"""Fields of bodies that go to `SamplingParams`, which checks them: their ranges stand there."""

from typing import Any

from quire import sampling_params as sampling
from quire.sampling_params import SamplingParams
from quire.server.http.schema import Field, Schema, array, number


def sampling_field(name: str, text: str, *aliases: str, **changes: Any) -> Field:
    """The declaration of a field of `SamplingParams`.

    Args:
        text: what it does.
        aliases: other names of it.
        changes: to its schema.
    """
    default = SamplingParams.__dataclass_fields__[name].default
    shown = {} if default is None else {"default": default}
    schema = {"type": "boolean"} if name in sampling.FLAGS else number(sampling.RANGES[name])
    return Field(text, aliases=aliases, schema={**schema, **shown, **changes})


def strings(most: int) -> Schema:
    """The schema of a string or of several."""
    one: Schema = {"type": "string", "minLength": 1, "maxLength": sampling.MAX_STOP_STRING_BYTES}
    return {"anyOf": [one, array(one, most)]}
