"""No data that runs as code, no place that is not the project's, and what the base install may hold."""

import pytest

from scripts.house.forbidden import check_forbidden, dangerous_code, foreign_places
from scripts.house.size import judge
from scripts.house.tree import ROOT, Source


def test_the_tree_is_clean() -> None:
    assert check_forbidden(ROOT).breaches == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import a, marshal",
        "import torch\ntorch.load('x')",
        "eval('1')",
        "exec('1')",
        "numpy.load('x')",
        "numpy.load('x', allow_pickle=True)",
        "yaml.load('x')",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
    ],
)
def test_code_running_data_is_seen(code: str) -> None:
    assert len(dangerous_code(Source("src/quire/a.py", code))) == 1


@pytest.mark.parametrize(
    "code",
    [
        "import re\nre.compile('x')",
        "numpy.load('x', allow_pickle=False)",
        "model.eval()",
        "json.load(file)",
        "AutoModel.from_pretrained('x', trust_remote_code=False)",
    ],
)
def test_what_only_looks_alike_passes(code: str) -> None:
    assert dangerous_code(Source("src/quire/a.py", code)) == []


@pytest.mark.parametrize(
    "text",
    [
        "cd /" + "work/main",
        "'/" + "work'",
        "see .lib" + "rary/x",
        "https://py" + "pi.org/simple",
        "files.python" + "hosted.org",
    ],
)
def test_a_foreign_place_is_seen(text: str) -> None:
    assert foreign_places("docs/a.md", f"one\n{text}\n")[0].startswith("docs/a.md:2: names ")


@pytest.mark.parametrize(
    "text", ["how it works/fails", ".github/workflows/ci.yml", "the work/rest ratio", "a library/b"]
)
def test_common_words_pass(text: str) -> None:
    assert foreign_places("docs/a.md", text) == []


def test_the_install_is_judged() -> None:
    assert judge({"bytes": {"numpy": 70_000_000, "quire": 20_000_000}, "unwanted": []}, 150) == []
    assert judge({"bytes": {"numpy": 151_000_000}, "unwanted": ["torch"]}, 150) == [
        "base install: 151.0 MB, the budget is 150 MB",
        "the base install pulls in torch",
    ]
