"""The port that `quire serve` listens on, where none is said."""

from typing import Any

import pytest

from quire.cli import serve
from quire.cli.main import main
from quire.errors import ConfigurationError


@pytest.mark.parametrize(
    ("flags", "port"),
    [([], 8000), (["--ollama"], 11434), (["--ollama", "--port", "0"], 0), (["--port", "9"], 9)],
    ids=str,
)
def test_ollama_has_a_port_of_its_own(flags: list[str], port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def bind(host: str, port: int, flag: str) -> None:
        asked.append(port)
        raise ConfigurationError("enough", field="port")

    monkeypatch.setattr("quire.server.http.listen.bind", bind)
    assert main(["serve", *flags]) != 0
    assert asked == [port] and serve.OLLAMA_PORT == 11434
