"""The figures in the prose of the course, worked again from the shapes of the models and the devices' data sheets."""

import heapq
import re

import pytest

from quire.bench.workloads import mixed_lengths
from quire.plan.devices import DEVICES
from scripts.course_commands import LANGUAGES, commands, sections

MATRICES = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096
"""Weights of Llama-2-7B that a step multiplies with: layers and head."""
WEIGHTS = 2 * (MATRICES + 32000 * 4096) + 4 * 65 * 4096
"""Bytes in float16, and of the norms in float32."""
READ = 2 * MATRICES + 4 * 65 * 4096
TOKEN = 2 * 32 * 32 * 128 * 2
INT4_READ = (MATRICES - 32000 * 4096) * 4.5 / 8 + 32000 * (4096 + 4) + 4 * 65 * 4096
"""The layers in 4.5 bits, the head in 8 with a scale for each row."""
SPEED_40, SPEED_80, RATE = 1555e9, 2039e9, 312e12
HEAD = 32000 * 4096
A100_40, L4 = 40960 * 2**20, 23034 * 2**20
"""Memory as the driver reports it."""


def compared() -> tuple[int, int, int]:
    """How many requests of W2 section 2.2 compares, and the slots of either side."""
    (line,) = [one.line for one in commands(sections("en")["2.2"].read_text()) if one.line.startswith("quire compare")]
    assert "--workload W2" in line
    number, quire, static = (
        int(re.findall(rf"--{flag} (\d+)", line)[0]) for flag in ("num-prompts", "max-num-seqs", "batch-size")
    )
    return number, quire, static


NUMBER, SLOTS, BATCH = compared()
ITEMS = mixed_lengths(0, 32000)[:NUMBER]
OUTPUTS = [one.num_output for one in ITEMS]
PROMPTS = [len(one.prompt_token_ids) for one in ITEMS]


def static_steps(values: list[int], batch: int) -> int:
    """Each batch takes as long as its longest."""
    return sum(max(values[start : start + batch]) for start in range(0, len(values), batch))


def continuous_steps(outputs: list[int], slots: int) -> int:
    """A slot that ends takes the next: the prompts fit into the budget of a step."""
    ends = [0] * slots
    for output in outputs:
        heapq.heapreplace(ends, ends[0] + output)
    return max(ends)


def first_token_ms(prompt: int) -> float:
    """The floor of a prompt on the A100."""
    attention = 4 * 4096 * (prompt + 1) / 2 * 32
    return (prompt * (2 * (MATRICES - HEAD) + attention) + 2 * HEAD) / RATE * 1e3


def ms(num_bytes: float, speed: float = SPEED_40) -> float:
    return num_bytes / speed * 1e3


FIGURES = [
    ("1.1", "13.21 GFLOP", 2 * MATRICES / 1e9),
    ("1.1", "6.607 G", MATRICES / 1e9),
    ("1.1", "294", 2 * MATRICES / 45e6),
    ("1.1", "0.00014 ms", 45e6 / RATE * 1e3),
    ("1.1", "0.042 ms", 2 * MATRICES / RATE * 1e3),
    ("1.1", "13.48 GB", WEIGHTS / 1e9),
    ("1.1", "12.55 GiB", WEIGHTS / 2**30),
    ("1.1", "6.5 ms", ms(READ, SPEED_80)),
    ("1.1", "8.5 ms", ms(READ)),
    ("1.1", "9.19", ms(READ + 2048 * TOKEN)),
    ("1.1", "19.55", ms(READ + 16 * 2048 * TOKEN)),
    ("1.1", "2.1", ms(READ + 16 * 2048 * TOKEN) / ms(READ + 2048 * TOKEN)),
    ("1.1", "7.5", 16 * ms(READ + 2048 * TOKEN) / ms(READ + 16 * 2048 * TOKEN)),
    ("1.1", "7.01 ms", ms(READ + 2048 * TOKEN, SPEED_80)),
    ("1.1", "143", 1e3 / ms(READ + 2048 * TOKEN, SPEED_80)),
    ("1.1", "114", 0.8e3 / ms(READ + 2048 * TOKEN, SPEED_80)),
    ("1.2", "16 GiB", 16 * 2048 * TOKEN / 2**30),
    ("1.2", "17.18 GB", 16 * 2048 * TOKEN / 1e9),
    ("1.2", "0.5 MiB", TOKEN / 2**20),
    ("1.2", "270,336", 2 * 32 * 32 * (128 + 4)),
    ("1.2", "52 %", 100 * (128 + 4) / 256),
    ("1.1", "109", 1e3 / ms(READ + 2048 * TOKEN)),
    ("1.1", "12.3", READ / (2048 * TOKEN)),
    ("1.1", "88.5", first_token_ms(2048)),
    ("1.1", "110.7", first_token_ms(2048) / 0.8),
    ("1.2", "42.95 GB", A100_40 / 1e9),
    ("1.2", "23", (0.9 * A100_40 - WEIGHTS) // (2048 * TOKEN)),
    ("1.2", "20", (0.9 * 40e9 - WEIGHTS) // (2048 * TOKEN)),
    ("1.2", "24.15 GB", L4 / 1e9),
    ("1.2", "21.74", 0.9 * L4 / 1e9),
    ("1.2", "3.85", (0.9 * L4 - WEIGHTS) / (4096 * TOKEN)),
    ("1.2", "8.3", (0.9 * L4 - 3.906e9) / (4096 * TOKEN)),
    ("2.1", "90 %", 100 * (50 - 5) / 50),
    ("2.1", "47 %", 100 * (1 - 0.5 / 0.95)),
    ("2.1", "37.5 %", 100 * 1536 / 4096),
    ("2.1", "62.5 %", 100 * (1 - 1536 / 4096)),
    ("2.1", "599", 31.5 / 0.05 - 31.5),
    ("2.1", "143", 7.5 / 0.05 - 7.5),
    ("2.1", "3,001", (0.9 * A100_40 - WEIGHTS) // (16 * TOKEN)),
    ("2.1", "57,038", (0.9 * 143771 * 2**20 - 16.061e9) // (16 * 131072)),
    ("2.1", "14 us", 24.306 * 0.57038),
    ("2.1", "7.1 ms", 512 * 24.306e-3 * 0.57038),
    ("2.1", "3.13 ms", 15.01 / 4800 * 1e3),
    ("2.1", "1.4", 27.41 / 19.85),
    ("2.1", "2.5", 16.5 / 6.7),
    ("2.2", "62.5 %", 100 * (800 + 3 * 400) / (4 * 800)),
    ("2.2", "1.6", 1 / 0.625),
    ("2.2", "8.50 ms", ms(READ)),
    ("2.2", "320 ms", 800 * 8 / 20),
    ("2.2", "2.7", 572.1 / 210.7),
    ("2.2", "4.9", 614.4 / 126.0),
    ("2.2", "528", 4 * 120 + 2 * 24),
    ("2.2", "951", static_steps(OUTPUTS, BATCH)),
    ("2.2", "602", continuous_steps(OUTPUTS, SLOTS)),
    ("2.2", "1.58", static_steps(OUTPUTS, BATCH) / continuous_steps(OUTPUTS, SLOTS)),
    ("2.2", "243", static_steps(OUTPUTS[:8], 8)),
    ("2.2", "243", continuous_steps(OUTPUTS[:8], 8)),
    ("2.2", "5,331", sum(PROMPTS)),
    ("2.2", "7,520", BATCH * static_steps(PROMPTS, BATCH)),
    ("2.2", "108.75", (7 * 10 + 800) / 8),
    ("2.2", "13.6 %", 100 * 108.75 / 800),
    ("2.2", "7.4", 800 / 108.75),
    ("3.2", "0.867", 0.8668133),
    ("3.3", "28.1 %", 100 * 4.5 / 16),
    ("3.3", "3.775 GB", INT4_READ / 1e9),
    ("3.3", "3.12 ms", ms(INT4_READ + 2048 * TOKEN)),
    ("3.3", "2.9", ms(READ + 2048 * TOKEN) / ms(INT4_READ + 2048 * TOKEN)),
    ("3.3", "1.5", ms(READ + 16 * 2048 * TOKEN) / ms(INT4_READ + 16 * 2048 * TOKEN)),
    ("3.4", "798,720", 3072 * 256 + 4 * 3072),
    ("3.6", "11.2", 2800 / 250),
    ("3.6", "3.75", 450 / 120),
    ("3.6", "1.58", 95 / 60),
    ("3.6", "118", 1e3 / ms(READ)),
    ("3.6", "109", 1e3 / ms(READ + 2048 * TOKEN)),
    ("3.6", "88.5", first_token_ms(2048)),
    ("3.6", "110.7", first_token_ms(2048) / 0.8),
    ("3.6", "21.5", first_token_ms(512)),
    ("3.6", "26.8", first_token_ms(512) / 0.8),
]


def test_the_devices_have_the_memory_that_the_pages_count_with() -> None:
    found = [DEVICES[name].memory_bytes for name in ("a100-40", "l4", "h200")]
    assert found == [A100_40, L4, 143771 * 2**20]


def test_steps_are_divided_only_where_requests_wait_for_a_slot() -> None:
    """Else both take as many as the longest output has tokens, and the quotient would explain nothing."""
    assert SLOTS == BATCH < NUMBER
    assert continuous_steps(OUTPUTS, NUMBER) == static_steps(OUTPUTS, NUMBER) == max(OUTPUTS)


def test_a_batch_of_two_thousand_eight_hundred_tokens_a_second() -> None:
    """What 3.6 says of it: 32 sequences with contexts of 256, or 48 of 512, with nothing lost."""
    for batch, context in ((32, 256), (48, 512)):
        assert batch / ms(READ + batch * context * TOKEN) * 1e3 == pytest.approx(2800, rel=0.03)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_figures_of_the_prose(language: str) -> None:
    pages = {section: path.read_text(encoding="utf-8") for section, path in sections(language).items()}
    prose = {section: re.sub(r"^```.*?^```", "", text, flags=re.M | re.S) for section, text in pages.items()}
    missing = [(section, text) for section, text, _ in FIGURES if not re.search(rf"(?<![\d.,]){text}", prose[section])]
    assert missing == []


@pytest.mark.parametrize(("section", "text", "value"), FIGURES, ids=[f"{one[0]} {one[1]}" for one in FIGURES])
def test_a_figure_is_what_the_arithmetic_gives(section: str, text: str, value: float) -> None:
    """To half of its last digit."""
    number = text.split()[0].replace(",", "")
    digits = len(number.partition(".")[2])
    assert abs(float(number) - value) <= 0.5 * 10**-digits + 1e-9 * abs(value), value
