"""The blocks of docs/your-own-model.md that need packages beyond the test extra."""

import doctest
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "your-own-model.md").read_text()


@pytest.fixture(scope="module")
def names():
    """The data and the NNX network of the page."""
    start = PAGE.partition(">>> train(")[0]
    values = {}
    for example in doctest.DocTestParser().get_examples(start):
        if not example.want:
            exec(example.source, values)
    return values


def block_with(name):
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    (block,) = (block for block in blocks if f"import {name}\n" in f"{block}\n")
    return block


@pytest.mark.parametrize(
    ("package", "text"), [("equinox", "equinox as eqx"), ("torch", "torch")]
)
def test_blocks_of_other_libraries(package, text, names, capsys):
    pytest.importorskip(package)
    block = block_with(text)
    exec(block, {**names})
    (expected,) = re.findall(r"^print\(.*\)  # (.*)$", block, re.M)
    assert capsys.readouterr().out.strip() == expected
