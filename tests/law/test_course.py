"""The course: both languages show the same commands, and what the pages show is what the commands print.

Here run those marked `quick`; `python -m scripts.course_commands` runs all.
"""

import re
from pathlib import Path

import pytest

from scripts.course_commands import COURSE, LANGUAGES, Command, commands, difference, run_commands, sections

ENGLISH = sections("en")


def page(language: str, section: str) -> str:
    return sections(language)[section].read_text(encoding="utf-8")


def test_both_languages_have_the_same_sections_commands_and_links() -> None:
    assert [path.name for path in ENGLISH.values()] == [path.name for path in sections("zh-TW").values()]
    for section in ENGLISH:
        english, chinese = (page(language, section) for language in LANGUAGES)
        assert commands(english) == commands(chinese) != [], section
        for what in (r"^#+ ", r"^```", r"^\|", r"\]\((?:\.\./\.\./|http)[^)\s]+\)"):
            found = [len(re.findall(what, text, re.MULTILINE)) for text in (english, chinese)]
            assert found[0] == found[1], f"{section} has another number of {what} in each language: {found}"


def test_each_contents_lists_every_section_of_its_language() -> None:
    for language in LANGUAGES:
        contents = (COURSE / language / "README.md").read_text(encoding="utf-8")
        both = (COURSE / "README.md").read_text(encoding="utf-8")
        for path in sections(language).values():
            assert f"]({path.name})" in contents and f"]({language}/{path.name})" in both, path


def test_every_command_has_words_that_it_must_print() -> None:
    """So that none can pass whatever it prints; but those that print nothing."""
    bare = [
        command.line
        for section in ENGLISH
        for command in commands(page("en", section))
        if command.expected and not re.search(r"[a-z]{3}", " ".join(command.expected))
    ]
    assert bare == []


QUICK = {section: [one for one in commands(page("en", section)) if one.quick] for section in ENGLISH}


@pytest.mark.parametrize("section", [section for section, found in QUICK.items() if found])
def test_quick_commands_print_what_the_pages_show(section: str) -> None:
    wrong = [f"{ran.command.line}\n{ran.fault}\n{ran.output}" for ran in run_commands(QUICK[section], 60) if ran.fault]
    assert wrong == []


def test_the_chinese_pages_are_in_the_chinese_of_taiwan() -> None:
    """Full-width punctuation beside Chinese characters; no simplified characters, none of the other side's words."""
    han = "[\u4e00-\u9fff]"
    simplified = "这们时会个为发对么问题让应该来说过还开关动实现网类处"
    elsewhere = "內存|緩存|顯存|服務器|信息|默認|軟件|硬件|帶寬|數據|運行|調用|程序|質量|優化器|字符(?!合)|接口|支持"
    for path in [*sections("zh-TW").values(), COURSE / "zh-TW/README.md"]:
        text = re.sub(r"^```.*?^```|`[^`\n]*`|\]\([^)]*\)", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
        assert re.findall(rf".*{han}[,;:?!()].*|.*[,;:?!(]{han}.*", text) == [], path.name
        assert re.findall(rf".*(?:[{simplified}]|{elsewhere}).*", text) == [], path.name


def run(output: str, *expected: str, measured: bool = False) -> str | None:
    return difference(Command("x", expected, measured=measured), output)


def test_an_output_is_held_against_what_a_page_shows() -> None:
    assert run("a  1\nb 2\n", "a 1", "b 2") is None
    assert run("a 1\nb 3\n", "a 1", "b 2") == run("a 1\n", "a 1", "b 2") == "not printed: b 2"
    assert run("a 1\nb 2\n", "a 1") == "more was printed than the page has"
    assert run("noise\nmore\na 1\n", "...", "a 1") is None
    assert run("a 1\n", "...", "a 1") is None
    assert run("a 1 since Monday\n", "a ... Monday") is None
    assert run("a 1 since Sunday\n", "a ... Monday") is not None
    assert run("a 1\nb 2\n", "a ... 2") is not None
    assert run("a 1.5\n", "a 12,000") is not None
    assert run("", "a") is not None
    assert run("") is None


def test_numbers_and_bars_of_a_measured_block_may_be_others() -> None:
    assert run("a 1.5 #\n", "a 12,000 ###", measured=True) is None
    assert run("a 1.5\n", "a 12,000 ###", measured=True) is None
    assert run("a x #\n", "a 12 ###", measured=True) is not None
    assert run("-0.02% 1e-3\n", "+1.93% 8.6e-06", measured=True) is None


def test_blocks_are_read_as_a_terminal_shows_them() -> None:
    console = "```console quick\n$ one \\\n  -d x\nout\n$ two &\n```\n```console measured\n$ three\n```\n"
    assert commands(f"{console}```sh\n$ four\n```\n") == [
        Command("one   -d x", ("out",), quick=True),
        Command("two &", (), quick=True),
        Command("three", (), measured=True),
    ]


def test_commands_run_beside_a_server_that_ends_with_them(tmp_path: Path) -> None:
    """Port 8000 becomes a free one, and what runs beside is ended, with what it started."""
    ended, url = tmp_path / "ended", "http://127.0.0.1:8000/docs/index.md"
    server = f"trap 'echo ended > {ended}' TERM; python -m http.server 8000 --bind 127.0.0.1 & wait &"
    ask = f"curl -s --retry 40 --retry-connrefused --retry-delay 1 {url} -o page; cmp page docs/index.md; echo at 8000"
    ran = list(run_commands([Command(server, ()), Command(ask, ("at 8000",))], 60))
    assert [one.fault for one in ran] == [None, None]
    assert ran[1].output == "at 8000\n" and ended.read_text() == "ended\n"


def test_a_command_that_does_not_end_is_ended(tmp_path: Path) -> None:
    (ran,) = run_commands([Command(f"sleep 60; touch {tmp_path}/late", ("never",))], 0.3)
    assert ran.fault is not None
    assert "still running" in ran.fault
