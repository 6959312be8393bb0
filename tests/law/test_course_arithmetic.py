"""The figures in the prose of the course, worked again from the shapes of the models and the devices' data sheets."""

import re

import pytest

from scripts.course_commands import LANGUAGES, sections

MATRICES = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096
"""Weights of Llama-2-7B that a step multiplies with: layers and head."""
WEIGHTS = 2 * (MATRICES + 32000 * 4096) + 4 * 65 * 4096
"""Bytes in float16, and of the norms in float32."""
READ = 2 * MATRICES + 4 * 65 * 4096
TOKEN = 2 * 32 * 32 * 128 * 2
INT4_READ = (MATRICES - 32000 * 4096) * 4.5 / 8 + 32000 * (4096 + 4) + 4 * 65 * 4096
"""The layers in 4.5 bits, the head in 8 with a scale for each row."""
SPEED_40, SPEED_80, RATE = 1555e9, 2039e9, 312e12
OUTPUTS = (114, 243, 26, 146, 119, 216, 93, 107)
"""Of the first eight requests of W2."""


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
    ("1.2", "3.8", (21.6e9 - WEIGHTS) / (4096 * TOKEN)),
    ("2.1", "90 %", 100 * (50 - 5) / 50),
    ("2.1", "47 %", 100 * (1 - 0.5 / 0.95)),
    ("2.1", "37.5 %", 100 * 1536 / 4096),
    ("2.1", "62.5 %", 100 * (1 - 1536 / 4096)),
    ("2.1", "599", 31.5 / 0.05 - 31.5),
    ("2.1", "143", 7.5 / 0.05 - 7.5),
    ("2.1", "2,684", (0.9 * 40e9 - WEIGHTS) // (16 * TOKEN)),
    ("2.1", "52,852", (0.9 * 141e9 - 16.061e9) // (16 * 131072)),
    ("2.1", "13 us", 24.306 * 0.52852),
    ("2.1", "6.6 ms", 512 * 24.306e-3 * 0.52852),
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
    ("2.2", "133", sum(OUTPUTS) / 8),
    ("2.2", "55 %", 100 * sum(OUTPUTS) / 8 / max(OUTPUTS)),
    ("2.2", "1.8", max(OUTPUTS) / (sum(OUTPUTS) / 8)),
    ("2.2", "4,016", 8 * 502),
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
]


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
