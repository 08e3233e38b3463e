"""The README and the examples do what they say."""

import doctest
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_readme_examples():
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    result = doctest.testfile(
        str(ROOT / "README.md"), module_relative=False, optionflags=flags
    )
    assert result.attempted > 10
    assert result.failed == 0


def test_readme_names_exist():
    import tripletjax as tj

    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"`(\w+_(?:loss|triplets))`", text):
        assert hasattr(tj, name), name
    for path in re.findall(r"`?((?:examples|benchmarks|tests)/[\w/.]+)", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", ["quickstart", "compose"])
def test_examples_run(name):
    done = subprocess.run(
        [sys.executable, "-W", "error", ROOT / "examples" / f"{name}.py"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.slow
def test_the_default_training_keeps_its_promise(tmp_path):
    """MAP@R of 96 % or more, on average; measured at 98.1."""
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "digits.py", "--seeds", "3"],
        capture_output=True,
        text=True,
        check=True,
    )
    (mean,) = re.findall(r"^mean +([\d.]+)", done.stdout, re.MULTILINE)
    assert float(mean) >= 96
