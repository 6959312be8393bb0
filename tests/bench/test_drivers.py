"""The drivers of other engines: transformers' against its own `generate`, the server's against Quire's own server."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quire import LLM, SamplingParams
from quire.bench.drivers.drive import starter
from quire.bench.peers import DRIVERS, EngineProcess, PeerError
from quire.bench.workloads import Item
from quire.cli.compare_engines import Given, processors, spec, unfit
from quire.llm import AsyncLLM
from tests.server.conftest import Running, start
from tests.tiny.checkpoints import make_tiny

ITEMS: list[dict[str, Any]] = [
    {"prompt_token_ids": [5, 6, 7, 8, 9], "num_output": 4},
    {"prompt_token_ids": [11, 12], "num_output": 7},
    {"prompt_token_ids": [20, 21, 22], "num_output": 1},
]
KV_BYTES_PER_TOKEN = 1024


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("drivers"), tokenizer=True)


def settings(tiny: Path, **more: Any) -> dict[str, Any]:
    common = {"model": str(tiny), "dtype": "float32", "device": "cpu", "threads": 1, "batch_size": 2, "name": "x"}
    return {**common, "kv_bytes": 2**22, "kv_bytes_per_token": KV_BYTES_PER_TOKEN, "start_timeout_s": 30.0, **more}


@pytest.fixture(scope="module")
def alone(tiny: Path) -> list[list[int]]:
    """transformers' greedy answers, each request alone and without padding."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
    found = []
    for item in ITEMS:
        ids = torch.tensor([item["prompt_token_ids"]])
        output = model.generate(ids, max_new_tokens=item["num_output"], attention_mask=torch.ones_like(ids))
        found.append(output[0, ids.shape[1] :].tolist())
    return found


@pytest.mark.parametrize("mode", ["static", "continuous"])
def test_transformers_answers_as_it_does_alone(tiny: Path, alone: list[list[int]], mode: str) -> None:
    engine = starter(str(DRIVERS / "transformers_driver.py"))(settings(tiny, mode=mode))
    try:
        for _ in range(2):
            ran = engine.run(ITEMS)
            assert ran["token_ids"] == alone
            assert ran["output_lens"] == [item["num_output"] for item in ITEMS]
            assert all(0 < wait <= ran["elapsed_s"] for wait in ran["ttfts_s"])
    finally:
        engine.close()
    if mode == "static":
        first, second, third = ran["ttfts_s"]
        assert first == second < third, "the third is of the second batch"
        config = LLM(str(tiny), dtype="float32").decisions
        per_token = next(one.reason for one in config if one.name == "kv_cache_dtype").split("; ")[1]
        positions = 2 * (5 + 7 - 1)  # two rows, padded to the longest prompt; the last token of an output is not kept
        assert ran["kv_bytes"] == positions * int(per_token.split()[0].replace(",", ""))


@pytest.fixture(scope="module")
def served(tiny: Path) -> Iterator[Running]:
    instance = start(AsyncLLM(str(tiny), dtype="float32", max_num_seqs=8))
    yield instance
    instance.stop()
    instance.engine.close()


def test_a_server_that_runs_is_asked(served: Running, tiny: Path) -> None:
    engine = starter(str(DRIVERS / "server_driver.py"))(settings(tiny, url=served.url))
    ran = engine.run(ITEMS)
    assert ran["output_lens"] == [item["num_output"] for item in ITEMS]
    assert all(0 < wait <= ran["elapsed_s"] for wait in ran["ttfts_s"])
    with pytest.raises(RuntimeError, match="the server answered 400"):
        engine.run([{"prompt_token_ids": [1], "num_output": 10**6}])


def test_a_server_that_is_not_there_is_missing(tiny: Path) -> None:
    start_server = starter(str(DRIVERS / "server_driver.py"))
    with pytest.raises(ModuleNotFoundError, match="there is no /no/such/llama-server"):
        start_server(settings(tiny, command=["/no/such/llama-server"]))
    with pytest.raises(ModuleNotFoundError, match="no_such_engine"):
        start_server(settings(tiny, command=["/bin/true"], module="no_such_engine"))
    with pytest.raises(RuntimeError, match="the server ended with 7: out of memory"):
        start_server(settings(tiny, command=["/bin/sh", "-c", "echo out of memory; exit 7"]))
    chatty = "yes out of words | head -c 2990000; echo at last; exit 7"
    with pytest.raises(RuntimeError, match="the server ended with 7: at last") as ended:
        start_server(settings(tiny, command=["/bin/sh", "-c", chatty]))
    (log,) = (len(entry.frame.f_locals["self"]._log) for entry in ended.traceback if entry.name == "_await_model")
    assert log == 2**18, "no more of what a server writes is kept"
    with pytest.raises(TimeoutError, match=r"no answer from 127\.0\.0\.1:9"):
        start_server(settings(tiny, url="http://127.0.0.1:9"))


def test_quires_own_driver_answers_as_an_llm_does(tiny: Path) -> None:
    from quire.cli import compare_driver

    engine = compare_driver.start(settings(tiny, max_model_len=64, max_num_seqs=4))
    ran = engine.run(ITEMS)
    generate = engine._llm.generate

    def late(*words: Any, **more: Any) -> Any:
        """As if each request had come long after all were given."""
        outputs = generate(*words, **more)
        for one in outputs:
            one.metrics.arrival_s += 1000.0
        return outputs

    engine._llm.generate = late  # type: ignore[method-assign]
    waits = engine.run(ITEMS)["ttfts_s"]
    engine.close()
    assert all(0 < wait < 1000 for wait in waits), "from the moment when all requests came"
    prompts: list[Any] = [{"prompt_token_ids": item["prompt_token_ids"]} for item in ITEMS]
    params = [SamplingParams(temperature=0, max_tokens=item["num_output"], ignore_eos=True) for item in ITEMS]
    with LLM(str(tiny), dtype="float32") as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    assert ran["token_ids"] == [output.outputs[0].token_ids for output in outputs]
    assert all(0 < wait <= ran["elapsed_s"] for wait in ran["ttfts_s"])


LLAMA_SERVER = """#!{python}
import json, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if "--version" in sys.argv:
    sys.exit(print("version: 1234 (0c1e570)", file=sys.stderr))
print("flags", json.dumps(flags), file=sys.stderr, flush=True)
begun, bad = time.monotonic(), {bad!r}
class Answers(BaseHTTPRequestHandler):
    def log_message(self, *words): pass
    def do_GET(self): self.answer(200, {{"data": [{{"id": "m"}}]}})
    def answer(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if time.monotonic() - begun < 0.5:
            return self.answer(503, {{"error": {{"message": "Loading model"}}}})
        count = body["max_tokens"] - bad * (body["max_tokens"] > 1)
        self.send_response(200)
        self.end_headers()
        for _ in range(count):
            self.wfile.write(b'data: {{"choices": [{{"text": "a"}}]}}\\n\\n')
        usage = json.dumps({{"choices": [], "usage": {{"completion_tokens": count}}}})
        self.wfile.write(f"data: {{usage}}\\n\\ndata: [DONE]\\n\\n".encode())
ThreadingHTTPServer(("127.0.0.1", int(flags["--port"])), Answers).serve_forever()
"""


@pytest.mark.parametrize("bad", [0, 1])
def test_llama_cpp_is_started_and_asked(tmp_path: Path, bad: int) -> None:
    """A script in llama-server's place, which loads for half a second."""
    binary = tmp_path / "llama-server"
    binary.write_text(LLAMA_SERVER.format(python=sys.executable, bad=bad))
    binary.chmod(0o755)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    given = Given(python={"llama.cpp": str(binary)}, files={"llama.cpp": str(tmp_path / "m.gguf")})
    common = settings(tmp_path, max_model_len=512, max_num_seqs=64, most_requests=32)
    assert unfit("llama.cpp", common, given) is None
    with EngineProcess(spec("llama.cpp", common, given)) as peer:
        peer.start(30.0)
        command = str(peer.facts.settings["command"])
        assert f"{binary} -m {tmp_path}/m.gguf -t 1 -tb 1 -np 8 -c 4096 --port " in command, (
            "8 of 512 tokens fit in 4 MiB"
        )
        assert peer.facts.versions == {"llama.cpp": "version: 1234 (0c1e570)"}
        assert peer.facts.kv_bytes == 8 * 512 * common["kv_bytes_per_token"]
        items = [Item([1, 2], 3), Item([4], 5)]
        if bad:
            with pytest.raises(PeerError, match="an output has 2 tokens where 3 were asked for"):
                peer.run(items, 30.0)
        else:
            assert peer.run(items, 30.0).output_lens == [3, 5]


CORES = [[0, 4], [1, 5], [2, 6], [3, 7]]


@pytest.mark.parametrize(
    ("threads", "cores", "found"),
    [
        (2, CORES, [0, 1]),
        (2, [[0, 1], [2, 3]], [0, 2]),
        (3, [[0, 1], [2, 3]], [0, 2, 1]),
        (3, [[0, 1], [2]], [0, 2, 1]),
        (8, CORES, [0, 1, 2, 3, 4, 5, 6, 7]),
        (9, CORES, []),
    ],
)
def test_threads_get_a_core_each_before_they_share_one(threads: int, cores: list[list[int]], found: list[int]) -> None:
    assert processors(threads, cores) == found


VLLM = """
from types import SimpleNamespace
cache = SimpleNamespace(num_gpu_blocks=8, block_size=16)
def LLM(model, **arguments):
    return SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=SimpleNamespace(cache_config=cache)))
__version__ = "0"
"""


@pytest.mark.parametrize(("bound", "said"), [([0, 2], "0,2"), ([], "nobind")])
def test_vllm_is_given_the_processors_that_quire_has(tmp_path: Path, bound: list[int], said: str) -> None:
    """A module in its place."""
    (tmp_path / "vllm.py").write_text(VLLM)
    (tmp_path / "torch.py").write_text("__version__ = '2'")
    common = settings(tmp_path, max_model_len=64, max_num_seqs=4, processors=bound, kv_bytes=2**31)
    with EngineProcess(spec("vllm", common, Given(environment={"vllm": {"PYTHONPATH": str(tmp_path)}}))) as peer:
        peer.start(30.0)
        assert peer.facts.settings["VLLM_CPU_OMP_THREADS_BIND"] == said
        assert peer.facts.settings["VLLM_CPU_KVCACHE_SPACE"] == "2"
        assert peer.facts.kv_bytes == 8 * 16 * KV_BYTES_PER_TOKEN, "its own account"


def test_a_cache_of_whole_gib_is_asked_for_as_such(tmp_path: Path) -> None:
    given = Given(files={"openvino": str(tmp_path)})
    for name, device, kv_bytes, why in (
        ("vllm", "cpu", 3 * 2**29, "its KV cache is of whole GiB, this is 1,536.0 MiB"),
        ("openvino", "cpu", 2**29, "its KV cache is of whole GiB, this is 512.0 MiB"),
        ("vllm", "cuda", 3 * 2**29, None),
        ("vllm", "cpu", 2**30, None),
        ("openvino", "cpu", 2**31, None),
    ):
        found = unfit(name, settings(tmp_path, device=device, kv_bytes=kv_bytes), given)
        assert found is None if why is None else (found or "").startswith(why)
