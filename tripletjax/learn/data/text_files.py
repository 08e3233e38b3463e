"""Text files of people and other programs: encoding and columns."""

import codecs
import re
from pathlib import Path

# Byte order marks of other encodings than UTF-8, the longer ones first.
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
SEPARATORS = ",;\t"
QUOTED = re.compile(r' *"((?:[^"]|"")*)" *')
# The first line by which Excel names the separator.
NAMED_SEPARATOR = re.compile(r'"?sep=(.)"?', re.IGNORECASE)
# The start of a file that shows whether it is text, in bytes.
START = 2**16


def read_lines(path: str | Path) -> list[str]:
    """Read the lines of a text file in UTF-8, with or without a byte order mark.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it has another encoding, or is no text.
    """
    with Path(path).open("rb") as file:
        content = file.read(START)
        for mark, encoding in MARKS.items():
            if content.startswith(mark):
                raise ValueError(
                    f"{path} must be text in UTF-8, got {encoding}; save it again as "
                    "UTF-8."
                )
        if b"\0" not in content:
            content += file.read()
    line = content[: content.find(b"\0")].count(b"\n") + 1
    if b"\0" in content:
        raise ValueError(
            f"{path}, line {line}: must be text in UTF-8, got a zero byte, as in "
            "images and other binary files."
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}, line {line}: must be text in UTF-8, got the byte "
            f"0x{content[error.start]:02x}, as in Latin-1 and binary files; save it "
            "again as UTF-8."
        ) from None
    # `str.splitlines` would also split at characters that may occur in names.
    return re.split(r"\r\n|\r|\n", text)


def read_rows(path: str | Path, *, columns: int) -> list[tuple[int, list[str]]]:
    """Read the rows of a file of values between commas, semicolons or tabs.

    Blanks around values are dropped, except in double quotes. The separator is the one
    that splits the first line into this number of columns.

    Returns:
        The number of each line that is not empty, counted from 1, and its values.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the file is not UTF-8 text, or a quote is not closed.
    """
    lines = [
        (number, line)
        for number, line in enumerate(read_lines(path), start=1)
        if line.strip()
    ]
    separator = None
    if lines and (named := NAMED_SEPARATOR.fullmatch(lines[0][1].strip())):
        separator = named[1]
        del lines[0]
    rows = []
    for number, line in lines:
        try:
            separator = separator or _find_separator(line, columns)
            rows.append((number, _split(line, separator)))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    return rows


def _find_separator(line: str, columns: int) -> str:
    def width(separator: str) -> int:
        try:
            return len(_split(line, separator))
        except ValueError:
            # A quote ends before another separator.
            return 0

    exact = [one for one in SEPARATORS if width(one) == columns]
    wider = [one for one in SEPARATORS if width(one) > columns]
    return (exact + wider + [SEPARATORS[0]])[0]


def _split(line: str, separator: str) -> list[str]:
    """The values of a line."""
    values, position = [], 0
    while True:
        if line[position:].lstrip(" ").startswith('"'):
            quoted = QUOTED.match(line, position)
            if quoted is None:
                raise ValueError("a quote is not closed.")
            values.append(quoted[1].replace('""', '"'))
            position = quoted.end()
            if position < len(line) and line[position] != separator:
                raise ValueError(f"a quote is followed by {line[position]!r}.")
        else:
            end = line.find(separator, position)
            end = len(line) if end < 0 else end
            values.append(line[position:end].strip())
            position = end
        if position == len(line):
            return values
        position += 1
