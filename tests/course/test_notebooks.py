"""The notebooks run as they are, and print what is stored in them."""

import re
from typing import Any

import pytest

from scripts import notebooks
from scripts.house.tree import ROOT


@pytest.mark.parametrize("name", ["continuous_batching", "kv_cache", "quantisation_and_structure"])
def test_a_notebook_prints_what_is_stored(name: str) -> None:
    notebook = notebooks.read(name)
    printed = notebooks.run(notebook)
    assert notebooks.differences(notebook, printed) == []
    shown = [text for text, cell in zip(printed, notebooks.code_cells(notebook), strict=True) if "print" in str(cell)]
    assert all(shown), "each cell that prints has printed"


@pytest.mark.parametrize("name", notebooks.names())
def test_a_notebook_is_one_for_jupyter(name: str) -> None:
    """The parts of nbformat 4.5 that are used here; links lead somewhere."""
    notebook = notebooks.read(name)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", one) for one in ids)
    for number, cell in enumerate(notebooks.code_cells(notebook), 1):
        assert cell["execution_count"] == number
        assert all(set(one) == {"name", "output_type", "text"} for one in cell["outputs"])
        assert not re.search(r"^\s*[%!]", "".join(cell["source"]), re.MULTILINE)
    text = "".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (notebooks.FOLDER / link).resolve().is_relative_to(ROOT)


def cells(*sources: str, stored: str = "1\n", tags: tuple[str, ...] = ()) -> dict[str, Any]:
    output = {"name": "stdout", "output_type": "stream", "text": [stored]}
    common = {"cell_type": "code", "metadata": {"tags": list(tags)}, "outputs": [output]}
    return {"cells": [{**common, "source": [source]} for source in sources]}


def test_what_differs_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = cells("a = 1\nprint(a)", "print(a + 1)")
    printed = notebooks.run(notebook)
    assert printed == ["1\n", "2\n"], "one namespace"
    assert notebooks.differences(notebook, printed) == ["cell 2 printed\n2\ninstead of\n1\n"]
    varies = cells("", tags=("varies",))
    assert notebooks.differences(varies, ["7\n"]) == []
    assert len(notebooks.differences(varies, ["7\n8\n"])) == len(notebooks.differences(varies, [""])) == 1
    real = cells("", tags=("smollm2",))
    assert len(notebooks.differences(real, ["none here\n"])) == int(notebooks.has_smollm2())
    monkeypatch.setattr(notebooks, "has_smollm2", lambda: False)
    assert notebooks.differences(real, ["none here\n"]) == []


def test_a_cell_that_raises_or_is_no_python_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"^cell 2:\n(?s:.*)NameError"):
        notebooks.run(cells("print(1)", "print(b)"))
    with pytest.raises(ValueError, match=r"^cell 1: invalid syntax"):
        notebooks.run(cells("%time 1"))
