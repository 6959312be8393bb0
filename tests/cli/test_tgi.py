"""The launcher's flags and environment, as `quire serve` takes them."""

from typing import Any

import pytest

from quire.cli import serve
from quire.cli.arguments import Parser, canonical, engine_values
from quire.cli.tgi import DEFAULTS, TABLE, Spoken, Taken, translated
from quire.config import EngineArgs
from quire.errors import ConfigurationError


def options(words: list[str], environment: dict[str, str] | None = None) -> tuple[Any, list[str]]:
    """What the server's own parser makes of it, and what was said."""
    said: list[str] = []
    parser = Parser(prog="quire serve", allow_abbrev=False)
    serve.add(parser)
    line = canonical(translated(["--tgi", *words], environment or {}, said.append), said.append)
    return parser.parse_args(line), said


def test_a_deployment_of_tgi_starts_as_it_is() -> None:
    environment = {
        "MODEL_ID": "owner/name", "REVISION": "v2", "MAX_INPUT_TOKENS": "1000", "MAX_TOTAL_TOKENS": "1512",
        "QUANTIZE": "bitsandbytes", "MAX_CONCURRENT_REQUESTS": "64", "PORT": "80", "HOSTNAME": "0.0.0.0",
        "JSON_OUTPUT": "true", "MAX_BATCH_TOTAL_TOKENS": "1601", "PAYLOAD_LIMIT": "2000000", "PATH": "/bin",
        "API_KEY": "secret", "CUDA_MEMORY_FRACTION": "0.8", "TRUST_REMOTE_CODE": "false", "MAX_BATCH_SIZE": "32",
    }  # fmt: skip
    found, said = options([], environment)
    assert not said
    assert (found.port, found.host, found.log_format, found.api_key) == (80, "0.0.0.0", "json", ["secret"])
    assert set(found.limit) == {"prompt_tokens=1000", "body_bytes=2000000"}
    assert engine_values(found) == {
        "model": "owner/name", "revision": "v2", "max_model_len": 1512, "quantization": "int8", "max_num_seqs": 32,
        "max_num_queued_reqs": 64, "num_gpu_blocks_override": 101, "gpu_memory_utilization": 0.8,
    }  # fmt: skip
    assert serve._limit_values(found.limit) == {"prompt_tokens": 1000, "body_bytes": 2000000}


def test_flags_go_before_variables_and_ours_stand_beside_them() -> None:
    environment = {"PORT": "80", "MODEL_ID": "a/b"}
    found, _ = options(["--model-id=c/d", "--port", "9", "--enforce-eager", "--num_shard", "1"], environment)
    assert (found.port, found.model, found.enforce_eager) == (9, "c/d", True)
    assert options(["-p", "7", "dir"])[0].port == 7 and options(["-p", "7", "dir"])[0].positional_model == ["dir"]


def test_what_nothing_is_said_of() -> None:
    found, _ = options([])
    assert (found.port, found.host, found.metrics_prefix) == (3000, "127.0.0.1", "tgi")
    assert set(DEFAULTS) == {"--port", "--metrics-prefix"}


def test_a_container_s_name_is_no_address() -> None:
    found, said = options([], {"HOSTNAME": "3f2a9c"})
    assert found.host == "127.0.0.1" and len(said) == 1 and "HOSTNAME" in said[0]


@pytest.mark.parametrize(
    ("words", "environment", "name"),
    [
        (["--trust-remote-code"], {}, "--trust-remote-code"), ([], {"SPECULATE": "3"}, "SPECULATE"),
        ([], {"QUANTIZE": "exl2"}, "QUANTIZE"), (["--lora-adapters", "x"], {}, "--lora-adapters"),
        ([], {"MAX_STOP_SEQUENCES": "65"}, "MAX_STOP_SEQUENCES"), ([], {"SHARDED": "true"}, "SHARDED"),
        (["--kv-cache-dtype", "fp8_e5m2"], {}, "--kv-cache-dtype"), (["--quantize"], {}, "--quantize"),
        ([], {"MAX_BATCH_TOTAL_TOKENS": "many"}, "MAX_BATCH_TOTAL_TOKENS"),
    ],
)  # fmt: skip
def test_what_is_not_honoured_is_refused_by_its_name(words: list[str], environment: dict[str, str], name: str) -> None:
    with pytest.raises(ConfigurationError, match=name):
        options(words, environment)


def test_the_type_of_the_cache_under_either_name() -> None:
    assert options(["--kv-cache-dtype", "int8"])[0].kv_cache_dtype == "int8"
    assert options(["--kv-cache-dtype", "fp8_e4m3fn"])[0].kv_cache_dtype == "fp8"


def test_what_changes_nothing_is_said() -> None:
    _, said = options(["--validation-workers", "4"], {"WAITING_SERVED_RATIO": "1.2", "MAX_TOP_N_TOKENS": "5"})
    assert [line.split()[1] for line in said] == ["--validation-workers", "WAITING_SERVED_RATIO"]


def test_every_flag_that_is_taken_is_one_of_ours() -> None:
    parser = Parser(prog="quire serve", allow_abbrev=False)
    serve.add(parser)
    known = {flag for action in parser._actions for flag in action.option_strings}
    assert {rule.flag for rule in TABLE.values() if isinstance(rule, Taken)} <= known
    assert len(TABLE) > 40


@pytest.mark.parametrize("flag", ["--quantize", "--kv-cache-dtype"])
def test_every_value_that_is_spoken_is_one_that_the_engine_takes(flag: str) -> None:
    rule = TABLE[flag]
    assert isinstance(rule, Spoken)
    for value in rule.values:
        EngineArgs(**engine_values(options([flag, value])[0]))
