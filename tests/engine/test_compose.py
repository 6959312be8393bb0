"""What an engine is made of follows from its arguments and the model's files."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import psutil
import pytest
from safetensors.numpy import load_file, save_file

from quire.compose import core
from quire.compose.core import CoreParts, compose_core
from quire.compose.served import DEFAULT_QUEUED_TOKENS, _limits, _queue, _start_core, compose
from quire.compose.text import compose_text
from quire.config import EngineArgs
from quire.core.engine_core import EngineCore, OverlappingCore
from quire.engine.channel import CoreInfo, ModelDescription
from quire.engine.queue import ANYBODY
from quire.errors import ConfigurationError, InvalidRequestError, ModelFileError
from quire.isolation import core_process, supervisor
from quire.isolation.supervisor import SupervisedChannel
from quire.ops.cpu import CpuOps
from quire.weights.formats.gguf_config import FILE_TYPES
from quire.weights.load import load_model
from tests.core.harness import new_request
from tests.tiny.checkpoints import make_tiny
from tests.tiny.gguf_files import plain, write_gguf

Q8_0: dict[str, Any] = {"general.file_type": gguf.LlamaFileType.MOSTLY_Q8_0.value}
SIZES: dict[str, Any] = {"max_num_seqs": 2, "max_model_len": 64, "num_gpu_blocks_override": 16, "threads": 1}


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy whose files a test may change."""
    shutil.copytree(tiny_model, tmp_path / "model")
    yield tmp_path / "model"


def core_of(directory: Path, **arguments: Any) -> CoreParts:
    return compose_core(EngineArgs(**(SIZES | {"model": str(directory)} | arguments)), directory)


@pytest.mark.parametrize(
    ("asked", "kind", "word"),
    [(None, EngineCore, "off"), (False, EngineCore, "off"), (True, OverlappingCore, "on")],
    ids=str,
)
def test_steps_overlap_on_the_cpu_only_where_asked(
    asked: bool | None, kind: type[EngineCore], word: str, tiny_model: Path
) -> None:
    parts = core_of(tiny_model, async_scheduling=asked)
    assert parts.core_type is kind
    decided = {decision.name: decision for decision in parts.info.decisions}["async_scheduling"]
    assert decided.value == word and (decided.reason == "as asked") == (asked is not None)


def test_sizes_and_labels_are_the_arguments(tiny_model: Path) -> None:
    parts = core_of(tiny_model, block_size=8, max_num_batched_tokens=40, gpu_memory_utilization=0.5)
    limits = parts.scheduler.config
    assert (limits.max_num_seqs, limits.max_num_batched_tokens) == (2, 40)
    assert (limits.max_model_len, limits.block_size, limits.num_blocks) == (64, 8, 16)
    assert (parts.info.max_model_len, parts.info.vocab_size) == (64, 320)
    labels = dict(parts.info.cache_config)
    assert labels["block_size"] == "8" and labels["num_gpu_blocks"] == "16"
    assert labels["enable_prefix_caching"] == "True" and labels["gpu_memory_utilization"] == "0.5"


def test_what_a_model_is_is_told_as_it_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    written = load_file(tiny_model / "model.safetensors")
    size = sum(one.size for one in written.values())
    assert core_of(tiny_model).info.model == ModelDescription("llama", size, "bfloat16")
    assert core_of(tiny_model, quantization="int8").info.model.weight_format == "int8"
    made = write_gguf(tiny_model, tmp_path / "model.gguf", "llama", plain("Q8_0"), **Q8_0)
    assert core_of(made).info.model == ModelDescription("llama", size, "Q8_0")
    unsaid = write_gguf(tiny_model, tmp_path / "unsaid.gguf", "llama", plain("Q8_0"))
    assert core_of(unsaid).info.model.weight_format == "bfloat16"


def test_the_formats_of_gguf_files_have_their_names() -> None:
    for number, name in FILE_TYPES.items():
        assert gguf.LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_") == name


def test_a_model_is_loaded_for_the_length_that_is_asked(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which set of LongRoPE's factors it takes follows from that, as does the size of the tables of positions."""
    loaded: list[Any] = []
    monkeypatch.setattr(core, "load_model", lambda *arguments: loaded.append(load_model(*arguments)) or loaded[-1])
    core_of(tiny_model, max_model_len=40)
    core_of(tiny_model, max_model_len=None)
    assert [model.max_model_len for model in loaded] == [40, 512]


@pytest.mark.parametrize(
    ("length", "chosen", "why"), [(256, "short", "within 256"), (257, "long", "exceeds 256 positions")]
)
def test_which_factors_of_longrope_all_sequences_have_is_said(
    length: int, chosen: str, why: str, tmp_path: Path
) -> None:
    """`tests/models/test_published.py` compares both with transformers."""
    directory = make_tiny("phi3", tmp_path / "phi3", tokenizer=True)
    (decision,) = (
        one
        for one in core_of(directory, max_model_len=length, num_gpu_blocks_override=17).info.decisions
        if one.name == "longrope"
    )
    assert decision.value == chosen and why in decision.reason


@pytest.mark.parametrize(
    ("asked", "dtype", "reason", "bytes_each"),
    [
        ("auto", "bfloat16", "auto: the type of the weights; ", 2 * 16),
        ("float32", "float32", "as asked; ", 4 * 16),
        ("int8", "int8", "as asked; a scale for each head and token; ", 16 + 4),
        ("int8_per_token_head", "int8", "as asked; a scale", 16 + 4),
        ("fp8_e4m3", "fp8", "as asked; a scale", 16 + 4),
        ("fp8_per_token_head", "fp8", "as asked; a scale", 16 + 4),
    ],
)
def test_what_the_cache_is_made_of_is_said(
    asked: str, dtype: str, reason: str, bytes_each: int, tiny_model: Path
) -> None:
    """A model of three layers with two key-value heads of 16; weights stay as they are."""
    parts = core_of(tiny_model, kv_cache_dtype=asked, dtype="bfloat16", num_gpu_blocks_override=None,
                    kv_cache_memory_bytes=2**18)  # fmt: skip
    decided = {decision.name: decision for decision in parts.info.decisions}
    token = 2 * 3 * 2 * bytes_each
    assert decided["kv_cache_dtype"].value == dtype and decided["dtype"].value == "bfloat16"
    assert decided["kv_cache_dtype"].reason.startswith(reason)
    assert decided["kv_cache_dtype"].reason.endswith(f"; {token:,} bytes a token")
    assert parts.scheduler.config.num_blocks == 2**18 // (16 * token)
    assert dict(parts.info.cache_config)["cache_dtype"] == asked


def test_a_cache_that_a_device_has_no_kernels_for_is_refused_before_loading(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CpuOps, "cache_dtypes", ("bfloat16", "float16", "float32"))
    monkeypatch.setattr(core, "load_model", None)
    with pytest.raises(ConfigurationError, match=r"kv_cache_dtype 'fp8_e4m3' needs device 'cpu'; cpu .* has bfloat16,"):
        core_of(tiny_model, kv_cache_dtype="fp8_e4m3")


@pytest.mark.parametrize(("quantization", "warned"), [("int4", True), ("int8", False), (None, False)])
def test_four_bits_of_a_small_model_are_warned_of(
    quantization: str | None, warned: bool, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    decisions = core_of(tiny_model, quantization=quantization).info.decisions
    assert any("may lose much by 4 bits" in one.reason for one in decisions) == warned
    assert ("may lose much by 4 bits" in caplog.text) == warned


@pytest.mark.parametrize("same", [True, False])
def test_a_head_of_its_own_beside_a_tied_one_is_used_and_said(same: bool, tmp_path: Path) -> None:
    directory = make_tiny("llama", tmp_path / "tied", tie_word_embeddings=True, tokenizer=True)
    tensors = load_file(directory / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].copy()
    save_file({**tensors, "lm_head.weight": head if same else head[::-1].copy()}, directory / "model.safetensors")
    said = [one.value for one in core_of(directory).info.decisions if one.name == "head"]
    assert said == ([] if same else ["lm_head.weight"])


def test_the_fingerprint_is_that_of_the_files(model: Path) -> None:
    """A core that restarts must not go on with requests under other weights: a file of equal size included."""
    first = core_of(model).info.model_fingerprint
    assert core_of(model).info.model_fingerprint == first
    file = model / "model.safetensors"
    os.utime(file, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns + 1))
    touched = core_of(model).info.model_fingerprint
    (model / "added.txt").write_text("")
    renamed = core_of(model).info.model_fingerprint
    assert len({first, touched, renamed}) == 3


@pytest.mark.parametrize("enabled", [True, False])
def test_prompts_are_found_again_only_with_a_prefix_cache(enabled: bool, tiny_model: Path) -> None:
    parts = core_of(tiny_model, enable_prefix_caching=enabled)
    engine_core = parts.core()
    hits = []
    for request_id in ("first", "second"):
        engine_core.scheduler.add(new_request(request_id, range(40), max_tokens=1))
        hits += [delta.num_cached_tokens for delta in engine_core.step()]
    assert hits == [0, 32 if enabled else 0]
    parts.executor.close()


@pytest.mark.parametrize(
    ("asked", "model_len", "bound"),
    [(None, 64, DEFAULT_QUEUED_TOKENS), (100, 64, 100), (None, 2**18, 2**21)],
)
def test_the_queue_holds_what_is_asked_or_eight_long_prompts(asked: int | None, model_len: int, bound: int) -> None:
    queue = _queue(EngineArgs(max_num_queued_tokens=asked), model_len)
    queue.enter(ANYBODY, bound, ("full",))
    with pytest.raises(InvalidRequestError, match=f"the queue holds {bound} "):
        queue.enter(ANYBODY, bound + 1, ("more",))


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_requests_may_bring_priorities_where_the_policy_has_them(policy: str, tiny_model: Path) -> None:
    args = EngineArgs(scheduling_policy=policy, seed=7)
    limits = _limits(args, compose_text(args, tiny_model), CoreInfo(64, 320, (), "fingerprint"))
    assert limits.has_priorities == (policy == "priority")
    assert (limits.max_model_len, limits.vocab_size, limits.seed) == (64, 320, 7)


def test_without_a_tokenizer_the_configuration_says_where_answers_end(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9], "temperature": 0.5}))
    text = compose_text(EngineArgs(), model)
    assert text.tokenizer is None and text.eos_token_ids == (7, 9)
    assert dict(text.default_params) == {"temperature": 0.5}


def test_another_tokenizer_is_taken_from_its_own_directory(model: Path, tiny_model: Path) -> None:
    (model / "tokenizer.json").unlink()
    text = compose_text(EngineArgs(tokenizer=str(tiny_model)), model)
    assert text.tokenizer is not None and text.eos_token_ids == (text.tokenizer.eos_token_id,) == (256,)


def test_a_hang_timeout_needs_a_process_that_can_be_ended(tiny_model: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        compose(EngineArgs(model=str(tiny_model), hang_timeout=5.0))
    assert caught.value.field == "hang_timeout"


def test_what_a_core_in_its_own_process_refuses_is_raised_here_with_its_argument(tiny_model: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    args = EngineArgs(**(SIZES | {"model": str(tiny_model), "core_process": True, "num_gpu_blocks_override": 3}))
    with pytest.raises(ConfigurationError, match="is 64, which needs") as caught:
        compose(args)
    assert caught.value.field == "max_model_len"
    assert not psutil.wait_procs(set(psutil.Process().children(recursive=True)) - before, timeout=60)[1]


def test_a_core_in_its_own_process_ends_where_the_text_side_cannot_be_built(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[SupervisedChannel] = []  # so that it is closed, and not collected, if it ends

    class Held(SupervisedChannel):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            held.append(self)

    monkeypatch.setattr(supervisor, "SupervisedChannel", Held)
    before = set(psutil.Process().children(recursive=True))
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelFileError, match=r"tokenizer\.json"):
        compose(EngineArgs(**(SIZES | {"model": str(model), "core_process": True})))
    assert not psutil.wait_procs(set(psutil.Process().children(recursive=True)) - before, timeout=30)[1]
    assert len(held) == 1


def test_a_core_that_follows_has_room_for_what_the_first_allowed(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By then less memory may be free."""
    started: list[Any] = []

    class Channel:
        def __init__(self, spawn: Any, timeout_s: float, label: str) -> None:
            spawn(None)
            spawn(CoreInfo(40, 100, (), ""))

    monkeypatch.setattr(supervisor, "SupervisedChannel", Channel)
    monkeypatch.setattr(core_process, "CoreProcess", lambda start, niceness: started.append(start))
    _start_core(EngineArgs(model=str(tiny_model), core_process=True), tiny_model, None)
    assert [start.args.max_model_len for start in started] == [None, 40]
    assert [start.args.core_process for start in started] == [False, False]
