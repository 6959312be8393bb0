"""Flags: made from the dataclasses, under every name that users bring with them."""

import argparse
import re
from dataclasses import fields
from typing import Any

import pytest

from quire.cli.arguments import (
    ALIASES,
    ENGINE_HELP,
    SAMPLING_HELP,
    Parser,
    add_engine,
    add_sampling,
    canonical,
    engine_values,
    sampling_values,
)
from quire.cli.main import VERBS, main, make_parser
from quire.config import EngineArgs
from quire.errors import ConfigurationError


def parse(*words: str) -> argparse.Namespace:
    parser = Parser(prog="x", allow_abbrev=False)
    add_sampling(parser)
    add_engine(parser, positional_model=True)
    options: argparse.Namespace = parser.parse_args(canonical(words, lambda _: None))
    return options


def test_every_engine_argument_is_a_flag() -> None:
    assert set(ENGINE_HELP) == {item.name for item in fields(EngineArgs)}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {}),
        (["some/model"], {"model": "some/model"}),
        (["--model", "m", "--max-num-seqs", "3"], {"model": "m", "max_num_seqs": 3}),
        (["--max_num_seqs=3"], {"max_num_seqs": 3}),
        (["--max-model-len", "2k"], {"max_model_len": 2000}),
        (["--max-model-len", "2K"], {"max_model_len": 2048}),
        (["--max-num-batched-tokens", "1.5k"], {"max_num_batched_tokens": 1500}),
        (["--kv-cache-memory-bytes", "0.5G"], {"kv_cache_memory_bytes": 2**29}),
        (["--kv-cache-memory-bytes", "8GiB"], {"kv_cache_memory_bytes": 2**33}),
        (["--kv-cache-dtype", "fp8_e4m3"], {"kv_cache_dtype": "fp8_e4m3"}),
        (["--kv_cache_dtype=int8"], {"kv_cache_dtype": "int8"}),
        (["one/model", "--model", "one/model"], {"model": "one/model"}),
        (["quire-demo"], {}),
        (["--max-model-len", "auto"], {"max_model_len": None}),
        (["--max-model-len", "-1"], {"max_model_len": None}),
        (["--no-enable-prefix-caching"], {"enable_prefix_caching": False}),
        (["--model-path", "m", "--context-length", "9", "--tp-size", "1"],
         {"model": "m", "max_model_len": 9, "tensor_parallel_size": 1}),
        (["--model_dir=m", "-tp", "1", "-c", "8", "-np", "2"],
         {"model": "m", "tensor_parallel_size": 1, "max_model_len": 8, "max_num_seqs": 2}),
        (["--mem-fraction-static", "0.5", "--disable-radix-cache"],
         {"gpu_memory_utilization": 0.5, "enable_prefix_caching": False}),
        (["--page_size", "32", "--schedule-policy", "priority", "--disable-cuda-graph"],
         {"block_size": 32, "scheduling_policy": "priority", "enforce_eager": True}),
        (["--swap-space", "4", "--enable-chunked-prefill", "--num-scheduler-steps=8", "--block-size", "16"],
         {"block_size": 16}),
    ],
)  # fmt: skip
def test_engine_values(words: list[str], expected: dict[str, Any]) -> None:
    assert engine_values(parse(*words)) == expected


def test_two_models_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="two models are named: one/model and --model another"):
        engine_values(parse("one/model", "--model", "another"))


def test_every_alias_leads_to_a_flag() -> None:
    known = {"--" + name.replace("_", "-") for name in (*ENGINE_HELP, *SAMPLING_HELP)}
    assert set(ALIASES.values()) <= known | {"--no-enable-prefix-caching", "--no-async-scheduling"}
    assert not set(ALIASES) & known


def test_sampling_values() -> None:
    options = parse("--max_new_tokens", "5", "--temperature", "0", "--stop", "a", "--stop", "b", "--no-ignore-eos")
    assert sampling_values(options) == {"max_tokens": 5, "temperature": 0.0, "stop": ["a", "b"], "ignore_eos": False}


def test_what_has_no_effect_says_so_once() -> None:
    said: list[str] = []
    assert canonical(["--swap_space", "4", "serve", "--use-v2-block-manager"], said.append) == ["serve"]
    assert len(said) == 2
    assert canonical(["--swap-space=4", "serve", "--preemption-mode"], said.append) == ["serve"]
    assert canonical(["--temperature", "-1", "-", "-0.5"], said.append) == ["--temperature", "-1", "-", "-0.5"]
    assert len(said) == 4
    assert all("no effect" in line for line in said)


def test_words_after_two_hyphens_are_left_alone() -> None:
    assert canonical(["--model_path", "m", "--", "--a_b"], print) == ["--model", "m", "--", "--a_b"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["generate", "--schema", "x"], "unknown flag '--schema'; did you mean '--json-schema' or '--yaml-schema'?"),
        (
            ["generate", "--quiet", "--json-schema", '{"type": "objekt"}', "x"],
            "quire: --json-schema: the keyword 'type' at # names no type: Invalid type: objekt",
        ),
        (["generate", "--quiet", "--regex", "(", "x"], "quire: --regex: "),
        (["generate", "--temprature", "1", "x"], "unknown flag '--temprature'; did you mean '--temperature'?"),
        (["serve", "--trust-remote-code"], "unknown flag '--trust-remote-code'"),
        (["chat", "a", "b"], "unexpected argument 'b'"),
        (["serve", "--max-num-seqs", "many"], "'many' is not a whole number"),
        (["serve", "--max-num-seqs", "1.5"], "'1.5' is not a whole number"),
        (["serve", "--max-num-seqs", "0.0015k"], "'0.0015k' is not a whole number"),
        (["serve", "--max-num-seqs", "1e400k"], "'1e400k' is not a whole number"),
        (["serve", "--max-num-seqs", "0"], "max_num_seqs must be a whole number between"),
        (["serve", "--port", "70000"], "port must be between"),
        (["serve", "--tensor-parallel-size", "2"], "tensor_parallel_size must be 1"),
        (["generate", "--dtype", "int3", "x"], "dtype must be one of"),
        (["generate", " "], "the prompt is empty"),
        (["bench", "throughput", "--reps", "0"], "reps must be at least 1"),
        (["bench"], "KIND"),
        (["run", "model"], "quire run: did you mean quire chat?"),
        (["ls"], "did you mean quire list?"),
        (["--debug", "remove"], "quire remove: did you mean quire rm?"),
        (["serv", "--port", "0"], "quire serv: did you mean quire serve?"),
        (["generate", "--temperature", "-1", "/nowhere/at/all", "x"], "temperature must be in"),
        (["chat", "--min-p", "2", "/nowhere/at/all"], "min_p must be in"),
        (["generate", "What is it?", "And that?"], "of several words the first is the model"),
        ([], "VERB"),
        (["fly"], "invalid choice: 'fly'"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert text in captured.err
    assert len(captured.err.strip().splitlines()) == 1


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"examples?:\n  .*quire {verb}", shown)


def test_version_and_debug(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"quire \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)
    assert make_parser(["doctor"]).parse_args(["--debug", "doctor"]).debug
    with pytest.raises(ValueError, match="max_num_seqs"):
        main(["--debug", "generate", "--max-num-seqs", "0", "x"])
