"""Sentences of the docs, of docstrings and of the help follow the rules of style.

`python tests/test_style.py` prints every finding.
"""

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tripletjax.cli.main import build_parser

ROOT = Path(__file__).parent.parent
LONGEST = 30  # words of a sentence
RULES = {
    "name the subject": r"^(What|Of|Who|Where)\b.*[^?]$",
    "name the actor": r"\b(is|are) (said|told|asked)\b",
    "write 'instead of'": r"\bin place of\b",
    "name the person": r"\b([Nn]obody|[Ss]omebody|[Ww]hom)\b",
    "say where a link goes": r"(?i)\[more\]",
}
# Sentences that stay as they are, by their first words.
EXCEPTIONS: tuple[str, ...] = ()

Blocks = Iterator[tuple[int, str]]


def prose_of_page(text: str) -> str:
    """The page without its code, tables, pictures and directives; lines stay."""
    lines, fence, figure = [], None, False
    for line in text.splitlines():
        opening = re.match(r"\s*(`{3,}|:{3,})(\{figure\})?", line)
        if fence is not None:
            closes = line.strip() == fence
            lines.append(line if figure and not closes and line[:1] != ":" else "")
            fence = None if closes else fence
        elif opening:
            fence, figure = opening[1], opening[2] is not None
            lines.append("")
        else:
            lines.append("" if re.match(r"\s*(\||<|!\[)", line) else line)
    return "\n".join(lines)


def prose_of_docstring(text: str) -> str:
    """The docstring without its formulas, doctests and references; lines stay."""
    text, *_ = re.split(r"^ *References:$", text, flags=re.M)
    blank = lambda match: "\n" * match[0].count("\n")  # noqa: E731
    text = re.sub(r"\$\$.*?\$\$", blank, text, flags=re.S)
    text = re.sub(r"^ *>>> .*?(\n *\n|\Z)", blank, text, flags=re.M | re.S)
    text = re.sub(r"^ *\|.*$", "", text, flags=re.M)
    text = re.sub(r"::\n\n(?:(?: {2,}.*)?\n)+", blank, text)
    title = "Args|Returns|Raises|Yields|Attributes|Note|Requirements|Settings|Relations"
    return re.sub(rf"^ *({title}):$", "", text, flags=re.M)


def prose_of_script(text: str) -> str:
    """The docstring of a script and its cells of text, without commands; lines stay."""
    lines, cell = [], False
    docstring = (ast.get_docstring(ast.parse(text), clean=False) or "").split("\n")
    for number, line in enumerate(text.split("\n")):
        cell = line.startswith("# %%") or (cell and line.startswith("#"))
        if number < len(docstring):
            kept = "" if docstring[number].startswith("    ") else docstring[number]
            lines.append(kept if re.search(r"\w", kept) else "")
        else:
            lines.append(line[2:] if cell and line[:4] != "# %%" else "")
    return "\n".join(lines)


def blocks_of(text: str) -> Blocks:
    """Paragraphs, headings, items of lists and entries of arguments, with lines."""
    block: list[str] = []
    start, indent = 0, 0
    # An item of a list or a heading; an argument of a docstring.
    item = re.compile(r"\s*([-*]|\d+\.|#+)\s+| {4,}\*{0,2}\w+(, \*{0,2}\w+)*:\s+")
    for number, line in enumerate([*text.splitlines(), ""], 1):
        depth = len(line) - len(line.lstrip())
        if block and (not line.strip() or item.match(line) or depth < indent):
            yield start, " ".join(block)
            block = []
        if line.strip():
            if not block:
                start, indent = number, depth
            begun = None if block else item.match(line)
            block.append(line[begun.end() :] if begun else line.strip())


def sentences_of(block: str) -> list[str]:
    """Sentences of a block, with each piece of code and each formula as one word."""
    text = " ".join(block.split())
    text = re.sub(r"\$[^$]+\$", "formula", text)
    text = re.sub(r"(`+)(.+?)\1", lambda m: "`" + re.sub(r"\W+", "_", m[2]), text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    text = re.sub(r"\b(e\.g|i\.e|al|cf|vs|Eq|Eqs|Fig|Sec|No)\.", r"\1", text)
    ends = r"""(?<=[.?!])["')\]*]* +(?=[\["'(*]*[A-Z0-9`])"""
    return re.split(ends, text)


def docstrings_of(file: Path) -> Blocks:
    """Docstrings of a module and of its public classes and functions."""

    def walk(node: ast.AST) -> Blocks:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            if getattr(node, "name", "").startswith("_"):
                return
            if text := ast.get_docstring(node):
                yield node.body[0].lineno, text
            if not isinstance(node, ast.FunctionDef):
                for child in node.body:
                    yield from walk(child)

    yield from walk(ast.parse(file.read_text()))


def help_of(parser: argparse.ArgumentParser) -> Blocks:
    """Texts of the help of a command and of its commands."""
    for text in (parser.description, parser.epilog):
        yield from blocks_of(text or "")
    for action in parser._actions:
        if action.help is not None and action.help != argparse.SUPPRESS:
            yield 0, action.help
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from help_of(command)


def texts() -> Iterator[tuple[str, int, str]]:
    """Every block of prose, with its file and line."""
    pages = [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("docs/reference/*.md"),
    ]
    for page in sorted(pages):
        for line, block in blocks_of(prose_of_page(page.read_text())):
            yield str(page.relative_to(ROOT)), line, block
    scripts = [*ROOT.glob("docs/gallery/*.py"), *ROOT.glob("examples/*.py")]
    for file in sorted([*scripts, *ROOT.glob("benchmarks/*.py")]):
        for line, block in blocks_of(prose_of_script(file.read_text())):
            yield str(file.relative_to(ROOT)), line, block
    for file in sorted((ROOT / "tripletjax").rglob("*.py")):
        if "/_" not in str(file.relative_to(ROOT)) or file.name == "__init__.py":
            for first, text in docstrings_of(file):
                for line, block in blocks_of(prose_of_docstring(text)):
                    yield str(file.relative_to(ROOT)), first + line - 1, block
    for line, block in help_of(build_parser()):
        yield "tripletjax --help", line, block


def findings() -> Iterator[str]:
    """Every sentence that breaks a rule, with its place and the rule."""
    for place, line, block in texts():
        for sentence in sentences_of(block):
            if sentence.startswith(EXCEPTIONS):
                continue
            broken = [rule for rule, sign in RULES.items() if re.search(sign, sentence)]
            if (words := len(re.findall(r"\w['\w.,-]*", sentence))) > LONGEST:
                broken.append(f"{words} words, at most {LONGEST}")
            for rule in broken:
                yield f"{place}:{line}: {rule}: {sentence}"


def test_sentences_follow_the_rules_of_style():
    assert list(findings()) == []


if __name__ == "__main__":
    print(*findings(), sep="\n")
