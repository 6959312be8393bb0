"""The embedded model for programs: in this process, and behind a server."""

from collections.abc import Iterator
from typing import Any

import pytest

from quire import LLM, AsyncLLM
from tests.server.conftest import Running, start


@pytest.fixture(scope="session")
def llm() -> Iterator[LLM]:
    with LLM(max_num_seqs=32) as llm:
        yield llm


@pytest.fixture(scope="session")
def served() -> Iterator[Running]:
    """The embedded model behind OpenAI's API."""
    instance = start(AsyncLLM(max_num_seqs=32))
    yield instance
    instance.stop()
    instance.engine.close()


def asked_alone(llm: LLM, call: Any) -> str:
    """The text of a call's prompt and parameters, asked by themselves."""
    params = llm.get_default_sampling_params()
    for name, value in call.given.items():
        setattr(params, name, value)
    if call.prompt.messages is None:
        (output,) = llm.generate(call.prompt.text, params, use_tqdm=False)
    else:
        conversation = call.prompt.conversation()
        (output,) = llm.chat(conversation.pop("messages"), params, use_tqdm=False, **conversation)
    return output.outputs[0].text
