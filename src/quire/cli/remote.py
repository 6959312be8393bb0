"""The flags of `quire chat` and `quire generate` that turn to a running server."""

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from quire.cli.arguments import ENGINE_HELP, engine_values, sampling_values
from quire.errors import ConfigurationError

if TYPE_CHECKING:
    from quire.cli.remote_server import Server


def add(parser: argparse.ArgumentParser) -> None:
    """The flags that turn to a server."""
    group = parser.add_argument_group("a running server")
    group.add_argument("--url", metavar="URL", help="ask this server, such as http://127.0.0.1:8000, and load no model")
    group.add_argument("--api-key", metavar="KEY", help="for a server that needs one")
    group.add_argument("--model-name", metavar="NAME", help="one of the server's models; its first")


def server_of(options: argparse.Namespace) -> "Server | None":
    """The server that the flags name; None without `--url`.

    Raises:
        ConfigurationError: flags that do not go together.
        QuireError: the server does not say what models it has.
    """
    if options.url is None:
        for name in ("api_key", "model_name"):
            if getattr(options, name) is not None:
                raise ConfigurationError(f"--{name.replace('_', '-')} needs --url", field=name)
        return None
    given = [name for name in ENGINE_HELP if name in engine_values(options) and name != "seed"]
    if given:
        flag = "--" + given[0].replace("_", "-")
        hint = "; --model-name says which of its models is asked" if "model" in given else ""
        raise ConfigurationError(f"{flag} does not go with --url: the server has its model{hint}", field=given[0])
    from quire.cli.remote_server import Server  # its HTTP client is slow to import

    server = Server(options.url, options.api_key)
    server.model_name = options.model_name or server.first_model()
    return server


def sampling_fields(options: argparse.Namespace) -> dict[str, Any]:
    """The sampling flags that were given, as fields of a body. There `--seed` is the request's own."""
    values = sampling_values(options)
    shape = values.get("structured_outputs")
    if shape is not None:
        values["structured_outputs"] = {name: value for name, value in asdict(shape).items() if value}
    return {**values, "seed": options.seed} if hasattr(options, "seed") else values
