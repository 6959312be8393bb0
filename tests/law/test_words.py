"""The check of words refuses what the glossary replaced, and nothing else."""

from pathlib import Path

import pytest

from scripts.house.tree import ROOT
from scripts.house.words import OldWord, check_words, old_words, read_words

OLD = """
# Nobody waits for this block.
somebody else may hold it
whoever asked has left
the scheduler is told which rows failed
# The next panel is asked for ahead of time.
constexpr int kTokensAhead = 4;
memory is reckoned before the start
class _Recording:
# Recordings are replayed.
out = self._ops.products(x)
from quire.ops.cuda import product_kernels
its batch-mates go on
companions of the row
each has stood its trial
acquitted
RepetitionWatch(params)
tiles of the matrix unit
stays in the second cache
model_stamp: str
class Doorkeeper:
OneFraming(app)
PatientProtocol
Oversight()
Tally(usage)
def asker(self) -> Asker:
async with unless_gone(request):
MemoryLedger
Ledger()
facts: EngineFacts
News(deltas)
patience_s = 3.0
self._bury()
takes_the_best
INPUT_LEVELS = 127
int kLeastBand = 16;
PartSource
OpenEnd(messages)
limits.weigh(value)
""".strip().splitlines()


@pytest.fixture(scope="module")
def words() -> list[OldWord]:
    return read_words(ROOT)


def test_src_native_and_docs_have_none() -> None:
    assert check_words(ROOT).breaches == []


@pytest.mark.parametrize("line", OLD)
def test_each_old_word_is_refused_with_the_field_s_own(line: str, words: list[OldWord]) -> None:
    (breach,) = old_words("src/quire/a.py", f'"""A file."""\n\n{line}\n', words)
    assert breach.startswith("src/quire/a.py:3: ") and ": write " in breach


def test_every_group_of_the_list_is_refused_by_some_line(words: list[OldWord]) -> None:
    assert [word.old.pattern for word in words if not any(word.old.search(line) for line in OLD)] == []


@pytest.mark.parametrize(
    "line",
    [
        "dot products of rows",
        "2^17 products of two bytes",
        "products_per_s",
        "the product of the sizes",
        "record_success()",
        "what the caller has been given",
        "weighted sums",
        "settled(value)",
        "while recording spans",
        "recorded in the journal",
        "two requests in the batch",
        "delivery",
        "the journal's news",
    ],
)
def test_common_words_pass(line: str, words: list[OldWord]) -> None:
    assert old_words("src/quire/a.py", line, words) == []


def test_a_word_in_native_code_or_a_page_is_found(tmp_path: Path) -> None:
    (tmp_path / "scripts/house").mkdir(parents=True)
    (tmp_path / "scripts/house/words.toml").write_text((ROOT / "scripts/house/words.toml").read_text())
    (tmp_path / "native/gemm").mkdir(parents=True)
    (tmp_path / "native/gemm/tile.h").write_text("// The first cache holds it.\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/a.md").write_text("Nobody waits.\n")
    tile, page = check_words(tmp_path).breaches
    assert tile == "native/gemm/tile.h:1: 'first cache': write L1, L2" and page.startswith("docs/a.md:1: 'Nobody'")
