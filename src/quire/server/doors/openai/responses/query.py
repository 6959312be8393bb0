"""What the query of a route for what is kept asks for beside pages."""

from typing import get_args

from starlette.requests import Request

from quire.errors import InvalidRequestError
from quire.server.doors.openai.responses.bodies import Included

_INCLUDED = get_args(Included)


def check_query(request: Request) -> None:
    """Refuse what is not honoured. What may be included is there in any case, where it was made.

    Raises:
        InvalidRequestError: naming the parameter.
    """
    for name, value in request.query_params.multi_items():
        if name in ("include", "include[]") and value not in _INCLUDED:
            raise InvalidRequestError(f"include must be a list of {' and '.join(_INCLUDED)}", param="include")
        if name == "include_obfuscation" and value != "false":
            text = "include_obfuscation is not supported: nothing is obfuscated here"
            raise InvalidRequestError(text, param=name)
