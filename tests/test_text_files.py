"""Text files of other programs: separators, quotes, encodings, and files of no text."""

import pytest

from tripletjax.apps.verification import lfw
from tripletjax.learn.data import triplet_files
from tripletjax.learn.data.text_files import read_lines, read_rows

READERS = (
    lambda file: read_rows(file, columns=3),
    triplet_files.load_triplets,
    lfw.read_pairs,
)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("a,b,c\n\n d , e,f \n", [["a", "b", "c"], ["d", "e", "f"]]),
        ("a;b;c\r\nd;e;f", [["a", "b", "c"], ["d", "e", "f"]]),
        ("a\tb\tc\rd\te\tf", [["a", "b", "c"], ["d", "e", "f"]]),
        ("a,1;b,2;c,3\n", [["a,1", "b,2", "c,3"]]),
        ("sep=;\na;b\n", [["a", "b"]]),
        ('"sep=\t"\na\tb\n', [["a", "b"]]),
        ("a,b\n", [["a", "b"]]),
        ("a,b,c,d\n", [["a", "b", "c", "d"]]),
        ("a,b,\n", [["a", "b", ""]]),
        ('" a", "b, ""c""" ,"d "\n', [[" a", 'b, "c"', "d "]]),
        ('a "b" c,"",e\n', [['a "b" c', "", "e"]]),
        ("caf\xe9\u2028,b,c\x0b\n", [["caf\xe9\u2028".strip(), "b", "c"]]),
        ("a\u2028b,c\x1cd,e\n", [["a\u2028b", "c\x1cd", "e"]]),
        ("", []),
    ],
)
def test_rows(tmp_path, text, rows):
    file = tmp_path / "rows.csv"
    for encoding in ("utf-8", "utf-8-sig"):
        file.write_bytes(text.encode(encoding))
        assert [row for _, row in read_rows(file, columns=3)] == rows


def test_rows_have_the_numbers_of_their_lines(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("sep=,\n\na,b,c\n\n\nd,e,f\n")
    assert [number for number, _ in read_rows(file, columns=3)] == [3, 6]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a.png,b.png,c.png".encode("utf-16"), "must be text in UTF-8, got UTF-16"),
        ("a.png,b.png,c.png".encode("utf-32"), "must be text in UTF-8, got UTF-32"),
        ("a.png,b.png,c.png".encode("utf-16-le"), "line 1: .*UTF-8, got a zero byte"),
        (b"a.png,b.png,c.png\nd\0", "line 2: .*UTF-8, got a zero byte"),
        (b"a.png,b.png,c.png\n" * 9999 + b"d\0", "line 10000: .*got a zero byte"),
        ("1\ncafé,b,c".encode("latin-1"), "line 2: .*the byte 0xe9, as in Latin-1"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "line 3: .*got a zero byte, as in images"),
        (b"\xff\xd8\xff\xe0JFIF", "line 1: .*the byte 0xff, as in Latin-1 and binary"),
    ],
)
def test_files_that_are_no_text_in_utf8(tmp_path, content, words, read):
    file = tmp_path / "file.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^\S*file\.txt[:, ]*{words}"):
        read(file)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('a,b,c\n"d,e,f\ng,h,i\n', "line 2: a quote is not closed"),
        ('"a"b,c,d\n', "line 1: a quote is followed by 'b'"),
    ],
)
def test_quotes_that_do_not_end(tmp_path, text, words):
    file = tmp_path / "rows.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"rows\.csv, {words}"):
        read_rows(file, columns=3)


def test_lines(tmp_path):
    file = tmp_path / "lines.txt"
    file.write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n")
    assert read_lines(file) == ["a", "b", "c", ""]
