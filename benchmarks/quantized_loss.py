"""What quantisation costs a model: perplexity of a text, and KL divergence of the next token from bfloat16.

    python benchmarks/quantized_loss.py DIR [--text FILE] [--context 1024] [--tokens 5000] [--engines ENGINE ...]

The text is cut into contexts of equal length, each begun anew; every token but the first of each is predicted.
Without FILE it is what the embedded model was taught about serving, in English (scripts/demo/facts_en.toml). With
engine directories, built from DIR, those are measured and not the formats to which a start rounds.
"""

import argparse
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quire.models.model import Model
from quire.ops.select import select_ops
from quire.ops.types import AttentionBatch, CacheDtype, Ops
from quire.quant.select import select_scheme
from quire.text.tokenizer import Tokenizer
from quire.weights.formats.engine_dir import read_manifest
from quire.weights.load import load_model

FORMATS: tuple[tuple[str, int | None], ...] = (
    ("int8", None), ("int8_w8a8", None), ("int4", 32), ("int4", 64), ("int4", 128)
)  # fmt: skip
CACHES: tuple[CacheDtype, ...] = ("int8", "fp8")
FACTS = Path(__file__).parents[1] / "scripts" / "demo" / "facts_en.toml"
_BLOCK_SIZE = 16
_ROWS = 256  # of logits that are looked at together

Logits = NDArray[np.float32]


def facts_text() -> str:
    """Some 4,800 tokens of English sentences that no model of others has seen."""
    facts = tomllib.loads(FACTS.read_text(encoding="utf-8"))
    return "\n".join(f"{fact['what']} {fact['why']}" for fact in facts.values())


def contexts_of(tokens: list[int], length: int) -> list[list[int]]:
    """The tokens in contexts of this length; a rest of one token predicts nothing and is left out."""
    cut = [tokens[start : start + length] for start in range(0, len(tokens), length)]
    return [context for context in cut if len(context) > 1]


def context_logits(model: Model, ops: Ops, context: list[int], *, outputs: int | None = None) -> Logits:
    """`[outputs, vocabulary]` of the last positions of one context, or of all."""
    count = len(context)
    num_blocks = -(-count // _BLOCK_SIZE)
    batch = AttentionBatch(
        positions=ops.array(np.arange(count), "int32"),
        query_starts=ops.array(np.array([0, count]), "int32"),
        starts=ops.array(np.array([0]), "int32"),
        block_tables=ops.array(np.arange(num_blocks)[None], "int32"),
        outputs=np.arange(count - (outputs or count), count, dtype=np.int32),
    )
    cache = ops.make_cache(model.cache_shape(num_blocks, _BLOCK_SIZE))
    return ops.to_numpy(model.logits(model.forward(ops.array(np.array(context), "int32"), batch, cache)))


def log_probs(logits: Logits) -> NDArray[np.float64]:
    """Natural logarithms of the probabilities, float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    normalized: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normalized


@dataclass(slots=True)
class Loss:
    """Sums over predicted tokens."""

    tokens: int = 0
    nll: float = 0.0
    same: int = 0
    kls: list[float] = field(default_factory=list)
    """KL divergence from the reference, nats, of each."""

    def add(self, reference: Logits, other: Logits, context: list[int]) -> None:
        """One context: what `other` loses against `reference`, both `[tokens, vocabulary]`."""
        for start in range(0, len(context) - 1, _ROWS):
            rows = slice(start, min(start + _ROWS, len(context) - 1))
            exact, found = log_probs(reference[rows]), log_probs(other[rows])
            targets = context[rows.start + 1 : rows.stop + 1]
            self.tokens += len(targets)
            self.nll -= float(found[np.arange(len(targets)), targets].sum())
            self.kls += (np.exp(exact) * (exact - found)).sum(axis=-1).tolist()
            self.same += int((exact.argmax(axis=-1) == found.argmax(axis=-1)).sum())

    @property
    def perplexity(self) -> float:
        """The exponential of the mean negative log-likelihood."""
        return float(np.exp(self.nll / self.tokens))

    @property
    def mean_kl(self) -> float:
        """KL divergence from the reference, nats a token."""
        return float(np.mean(self.kls))

    @property
    def p99_kl(self) -> float:
        """99 of 100 tokens have less."""
        return float(np.quantile(self.kls, 0.99))


def losses(directory: Path, contexts: list[list[int]], engines: list[Path]) -> Iterator[tuple[str, Loss]]:
    """Of bfloat16 itself, then of each format, or of each engine."""
    ops, _ = select_ops("cpu", None)
    length = max(map(len, contexts))
    model = load_model(directory, ops, "bfloat16", length)
    reference = [context_logits(model, ops, context) for context in contexts]
    del model

    def measured(other: Model) -> Loss:
        loss = Loss()
        for context, exact in zip(contexts, reference, strict=True):
            loss.add(exact, context_logits(other, ops, context), context)
        return loss

    yield "bfloat16", measured(load_model(directory, ops, "bfloat16", length))
    for engine in engines:
        scheme = select_scheme(read_manifest(engine).quantization, None)
        other = load_model(engine, ops, "bfloat16", length, scheme=scheme)
        yield f"{engine.name}, {other.weight_bytes / 2**20:.1f} MiB", measured(other)
    for name, group in () if engines else FORMATS:
        other = load_model(directory, ops, "bfloat16", length, scheme=select_scheme(name, group))
        yield f"{name}{f', groups of {group}' if group else ''}", measured(other)


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=5000)
    parser.add_argument("--engines", type=Path, nargs="+", default=[], metavar="ENGINE")
    options = parser.parse_args()
    text = options.text.read_text(encoding="utf-8") if options.text else facts_text()
    tokens = Tokenizer.from_directory(options.model).encode(text)[: options.tokens]
    print("| | perplexity | | KL | p99 | same token |\n|---|---|---|---|---|---|")
    exact = None
    for name, loss in losses(options.model, contexts_of(tokens, options.context), options.engines):
        exact = exact or loss.perplexity
        change = f"{loss.perplexity / exact - 1:+.1%}"
        kl = f"{loss.mean_kl:.1e} | {loss.p99_kl:.1e}"
        print(f"| {name} | {loss.perplexity:.2f} | {change} | {kl} | {loss.same / loss.tokens:.1%} |", flush=True)
    print(f"\n{loss.tokens} predicted tokens in contexts of {options.context}")


if __name__ == "__main__":
    main()
