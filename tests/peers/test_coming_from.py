"""The pairs of lines in docs/coming-from.md give the same."""

import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("pytorch_metric_learning")
pytest.importorskip("sentence_transformers")

PAGE = Path(__file__).parents[2] / "docs" / "coming-from.md"


def test_every_pair_of_lines_gives_the_same():
    names, compared = {}, 0
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S):
        exec(block, names)
        if "theirs" in names:
            theirs, ours = float(names.pop("theirs")), float(names.pop("ours"))
            assert theirs > 0, block
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, err_msg=block)
            compared += 1
    assert compared == PAGE.read_text().count("\ntheirs = ") >= 9
