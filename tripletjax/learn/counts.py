"""Numbers with their nouns, for printed lines and errors."""


def counted(number: int, one: str, several: str | None = None) -> str:
    """A number and its noun, in the singular or the plural.

    Args:
        number: of things.
        one: the words after the number 1.
        several: the words after other numbers; if not given, `one` with the ending of
            the plural.

    >>> counted(1, "image"), counted(2000, "image"), counted(0, "class")
    ('1 image', '2,000 images', '0 classes')
    >>> counted(1, "image is skipped", "images are skipped")
    '1 image is skipped'
    """
    if several is None:
        several = f"{one}es" if one.endswith("s") else f"{one}s"
    return f"{number:,} {one if number == 1 else several}"
