"""SmolLM2-135M-Instruct from its GGUF file, against transformers on the same file and the converted checkpoint."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from quire import LLM, SamplingParams
from quire.cli.main import main
from quire.ops.cpu import CpuOps
from quire.ops.select import instruction_sets
from quire.text.gguf_tokenizer import gguf_tokenizer
from quire.text.tokenizer import Tokenizer
from quire.weights.formats.gguf_text import read_gguf_tokenizer_values
from quire.weights.hub import packaged_model
from quire.weights.load import load_model
from tests.models.paged import PagedModel
from tests.real.conftest import PACKAGES, missing_packages
from tests.real.test_smollm2 import MAX_TOKENS, QUESTIONS
from tests.real.test_smollm2 import TEXTS as PROMPTS
from tests.text.test_gguf_tokenizer import TEXTS

pytestmark = pytest.mark.real
if MISSING := ", ".join(missing_packages() or [name for name in PACKAGES if find_spec(name) is None]):
    pytest.skip(f"no {MISSING}, which `make test` installs where it can", allow_module_level=True)

CHATS = [[{"role": "user", "content": question}] for question in QUESTIONS]
GREEDY = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)


@pytest.fixture(scope="module")
def file() -> Path:
    return packaged_model("smollm2")


@pytest.fixture(scope="module")
def tokenizer(file: Path) -> Tokenizer:
    header = read_gguf_tokenizer_values(file)
    return Tokenizer(gguf_tokenizer(header.name, header.values, header.architecture))


@pytest.fixture(scope="module")
def exact(file: Path) -> Iterator[Any]:
    """transformers' own reading of the file, its values in float32."""
    yield AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).eval()


def test_the_tokenizer_is_that_of_the_converted_checkpoint(tokenizer: Tokenizer, smollm2: Path) -> None:
    """transformers cuts no digits apart when it reads the file, as the model's own tokenizer does: that matters where
    digits have several bytes, of which some make tokens with their neighbours'."""
    theirs = AutoTokenizer.from_pretrained(smollm2)
    cut = AutoTokenizer.from_pretrained(smollm2)
    digits = pre_tokenizers.Digits(individual_digits=True)
    cut.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, cut.backend_tokenizer.pre_tokenizer])
    for text in [*TEXTS, *PROMPTS, *QUESTIONS]:
        judge = theirs if all(character.isascii() or not character.isnumeric() for character in text) else cut
        ids = judge.encode(text, add_special_tokens=True)
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
    for chat in CHATS:
        ids = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert tokenizer.apply_chat_template(chat, add_generation_prompt=True) == ids
    assert tokenizer.eos_token_id == theirs.eos_token_id and tokenizer.vocab_size == len(theirs)


def test_greedy_text_in_float32_is_that_of_transformers(file: Path, exact: Any) -> None:
    with LLM(str(file), dtype="float32", max_num_seqs=20, max_model_len=512) as llm:
        outputs = llm.chat(CHATS, GREEDY, use_tqdm=False) + llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    for output in outputs:
        answer = output.outputs[0].token_ids
        with torch.inference_mode():
            known = torch.tensor([[*output.prompt_token_ids, *answer[:-1]]])
            choices = exact(known, use_cache=False, logits_to_keep=len(answer)).logits[0].argmax(-1)
        assert answer == choices.tolist()


def test_perplexity_in_float32_is_that_of_transformers(file: Path, exact: Any, tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(" ".join(PROMPTS * 3))[:256]
    ops = CpuOps(2, instruction_sets()[-1])
    model = PagedModel(load_model(file, ops, "float32", 256), ops, num_blocks=16, block_size=16)
    ours = torch.from_numpy(model.all_logits(tokens, [len(tokens)]))
    with torch.inference_mode():
        theirs = exact(torch.tensor([tokens]), use_cache=False).logits[0]
    losses = [
        float(torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(tokens[1:])))
        for logits in (ours, theirs)
    ]
    print(f"perplexity {np.exp(losses[0]):.6f}, transformers' {np.exp(losses[1]):.6f}")
    assert abs(losses[0] - losses[1]) < 1e-5


def test_blocks_take_their_own_size_and_lose_less_than_bfloat16(file: Path, exact: Any) -> None:
    """5.74 bits a weight in place of 16; what is lost is the rounding of activations and of the cache."""
    tokens = np.random.default_rng(0).integers(0, 49_152, 128).tolist()
    with torch.inference_mode():
        theirs = exact(torch.tensor([tokens]), use_cache=False).logits[0]
    found = {}
    for ops in (CpuOps(2, instruction_sets()[-1]), Unpacking(2, instruction_sets()[-1])):
        model = load_model(file, ops, "bfloat16", 128)
        ours = torch.from_numpy(PagedModel(model, ops, num_blocks=8, block_size=16).all_logits(tokens, [128]))
        logs = [logits.double().log_softmax(-1) for logits in (theirs, ours)]
        kl = float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())
        found[type(ops)] = model.weight_bytes, kl
        print(f"{type(ops).__name__}: {model.weight_bytes:,} bytes, KL to float32 {kl:.2e}")
    (kept, loss), (unpacked, loss_unpacked) = found[CpuOps], found[Unpacking]
    assert kept < 0.37 * unpacked and 0 < loss < min(loss_unpacked, 3e-3)


class Unpacking(CpuOps):
    """A provider without formats of blocks."""

    formats = ()


def test_in_bfloat16_the_bits_are_those_of_the_converted_checkpoint(file: Path, smollm2: Path) -> None:
    """The same values, rounded the same way and packed the same way: so of every weight of the model."""
    ops = Unpacking(2, instruction_sets()[-1])
    tokens = np.random.default_rng(0).integers(0, 49_152, 64).tolist()
    logits = [
        PagedModel(load_model(path, ops, "bfloat16", 64), ops, num_blocks=4, block_size=16).all_logits(tokens, [64])
        for path in (file, smollm2)
    ]
    assert np.array_equal(*logits)


def test_a_first_conversation_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--temperature", "0", "--max-tokens", "12", "--max-model-len", "256"]
    assert main(["generate", "smollm2", "What is the capital of France?", *flags]) == 0
    captured = capsys.readouterr()
    assert (
        "Paris" in captured.out and "120 matrices of Q4_1 as int4_min in groups of 32, 5 bits a weight" in captured.err
    )
