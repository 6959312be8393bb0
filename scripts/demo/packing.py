"""Turns documents into rows of token numbers and loss weights of one fixed length."""

from collections.abc import Iterator
from functools import lru_cache
from random import Random

import numpy as np
from conversations import Document, Turn, documents
from numpy.typing import NDArray
from tokenizers import Tokenizer

QUESTION_WEIGHT = 0.1  # questions are worth knowing a little: what comes after an answer should look like one
DIGIT_WEIGHT = 3.0  # of the digits of calls and forms: to copy them is what is hard
CUT_TOKENS = 16  # enough of an answer to tell it from all others
Rows = tuple[NDArray[np.int64], NDArray[np.float32]]


class Packer:
    """Packs an endless stream of documents into batches of rows.

    Each row begins with a new document and is cut off at its end. Between documents stands <|bos|>, save
    that a conversation often follows another directly, as when a person changes the subject.

    The fraction `cut` of the conversations is only a question and the beginning of its answer. The words of
    the answers are learned soon; which answer a question wants takes long, so it pays to see more questions.
    """

    def __init__(self, tokenizer: Tokenizer, seed: int, cut: float) -> None:
        self._tokenizer = tokenizer
        self._cut = cut
        self._random = Random(seed)
        self._documents = documents(self._random)
        (self._bos,) = tokenizer.encode("<|bos|>").ids
        self._digits = {tokenizer.token_to_id(digit) for digit in "0123456789."}
        self._encode = lru_cache(maxsize=20_000)(self._encode_now)

    def _encode_now(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _segments(self, document: Document) -> Iterator[tuple[str, float]]:
        """Yield the pieces of the document, each with the weight of its loss."""
        if document.text:
            # A prompt may end in a space, which else is always joined to the word after it.
            space = document.text.find(" ", self._random.randrange(30)) + 1
            if space and self._random.random() < 0.3:
                yield document.text[:space], 0.0
                yield document.text[space:] + "<|im_end|>", 1.0
            else:
                yield document.text + "<|im_end|>", 1.0
        if document.system:
            yield f"<|im_start|>system\n{document.system}<|im_end|>\n", 0.0
        for turn in document.turns:
            yield f"<|im_start|>user\n{turn.question}<|im_end|>\n<|im_start|>assistant\n", QUESTION_WEIGHT
            yield turn.answer + "<|im_end|>", 1.0
            yield "\n", QUESTION_WEIGHT

    def _is_cut(self, turn: Turn) -> bool:
        """Draw whether to cut a conversation: never a sum, nor a long answer, which begins as the short one."""
        long = turn.topic is not None and turn.answer == turn.topic.detail
        return not long and " = " not in turn.answer and self._random.random() < self._cut

    def _row(self, length: int) -> tuple[list[int], list[float]]:
        """Return one row of exactly this many tokens."""
        ids: list[int] = []
        weights: list[float] = []
        after_turns = False
        while len(ids) < length:
            document = next(self._documents)
            if ids and not (after_turns and document.turns and self._random.random() < 0.4):
                ids.append(self._bos)
                weights.append(0.0)
            cut = bool(document.turns) and not document.drill and self._is_cut(document.turns[0])
            for text, weight in self._segments(Document(document.turns[:1], document.system) if cut else document):
                piece = self._encode(text) if weight == 1.0 else self._encode_now(text)
                if weight == 1.0 and cut:
                    piece = piece[:CUT_TOKENS]
                ids += piece
                heavy = DIGIT_WEIGHT if document.drill and weight == 1.0 else weight
                weights += [heavy if token in self._digits else weight for token in piece]
                if weight == 1.0 and cut:
                    break
            after_turns = bool(document.turns) and not cut
        return ids[:length], weights[:length]

    def batch(self, rows: int, length: int) -> Rows:
        """Return token numbers and loss weights, both [rows, length]."""
        packed = [self._row(length) for _ in range(rows)]
        ids = np.array([row[0] for row in packed], dtype=np.int64)
        return ids, np.array([row[1] for row in packed], dtype=np.float32)
