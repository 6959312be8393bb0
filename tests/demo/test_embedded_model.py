"""The embedded model through the real engine: small, and right about its one subject."""

from pathlib import Path

import pytest

from quire import LLM, RequestOutput
from quire.demo import model_path

ANSWERS = {
    "What is PagedAttention?": "blocks",
    "What is the KV cache?": "keys and values",
    "What is continuous batching?": "every step",
    "What is TTFT?": "first token",
    "What is quantisation?": "fewer bits",
    "What is 7 + 8?": "7 + 8 = 15.",
    "12 - 5 = ?": "12 - 5 = 7.",
    "PagedAttention 是什麼？": "區塊",
    "KV 快取是什麼？": "詞元",
    "連續批次處理是什麼？": "每一步",
    "TTFT 是什麼？": "首個詞元時間",
    "什麼是量化？": "位元",
    "Tell me a tiny story.": "The end.",
}


@pytest.fixture(scope="module")
def answers() -> dict[str, RequestOutput]:
    """Every question at once, with the model's own defaults."""
    with LLM(max_num_seqs=8) as llm:
        params = llm.get_default_sampling_params()
        params.max_tokens = 200
        outputs = llm.chat([[{"role": "user", "content": text}] for text in ANSWERS], params, use_tqdm=False)
    return dict(zip(ANSWERS, outputs, strict=True))


@pytest.mark.parametrize("question", ANSWERS)
def test_the_answer_is_right_and_ends(answers: dict[str, RequestOutput], question: str) -> None:
    answer = answers[question].outputs[0]
    assert ANSWERS[question] in answer.text
    assert answer.finish_reason == "stop"


def test_it_is_small_and_holds_no_code() -> None:
    files = list(Path(model_path()).iterdir())
    assert sum(file.stat().st_size for file in files) <= 16 * 10**6
    assert {file.suffix for file in files} <= {".json", ".safetensors"}
