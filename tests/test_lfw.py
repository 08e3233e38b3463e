"""Files of pairs of Labeled Faces in the Wild."""

import numpy as np
import pytest

from tripletjax.apps.verification import lfw

PAIRS = """2\t1
Ada\t1\t2
Ada\t1\tBo\t3
Cy\t10\t4
Bo\t1\tCy\t2
"""


def test_lfw_pairs(tmp_path):
    path = tmp_path / "pairs.txt"
    path.write_text(PAIRS)
    pairs = lfw.read_pairs(path)
    assert pairs.first[:2] == ["Ada/Ada_0001.jpg"] * 2
    assert pairs.second == [
        "Ada/Ada_0002.jpg",
        "Bo/Bo_0003.jpg",
        "Cy/Cy_0004.jpg",
        "Cy/Cy_0002.jpg",
    ]
    assert pairs.first[2] == "Cy/Cy_0010.jpg"
    np.testing.assert_array_equal(pairs.same, [True, False, True, False])
    np.testing.assert_array_equal(pairs.fold, [0, 0, 1, 1])
    path.write_text("\ufeff1\nAda B\t1\t2\nAda B\t1\tBo C\t3\n", encoding="utf-8")
    assert lfw.read_pairs(path).second[1] == "Bo C/Bo C_0003.jpg"
    path.write_text("1\n Ada\t1\t2\r\nAda \t1\t Bo\t 3 \t\n")
    assert lfw.read_pairs(path).first == [" Ada/ Ada_0001.jpg", "Ada /Ada _0001.jpg"]
    assert lfw.read_pairs(path).second[1] == " Bo/ Bo_0003.jpg"
    path.write_text("1\nAda 1 2\nAda 1 Bo 3\n")
    assert lfw.read_pairs(path, suffix=".png").first[0].endswith(".png")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1: expected the numbers"),
        ("folds\n", "line 1: expected the numbers"),
        (PAIRS[:-13], "line 1: expected 2 folds of 1 .* 4 lines, got 3"),
        (PAIRS.replace("Bo\t3", "Bo"), "line 3: expected 'name i other j'"),
        (PAIRS.replace("10\t4", "ten\t4"), "line 4: expected 'name i j'"),
    ],
)
def test_bad_lfw_pairs(tmp_path, text, words):
    path = tmp_path / "pairs.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        lfw.read_pairs(path)
