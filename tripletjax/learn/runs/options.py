"""Options as fields of dataclasses: one declaration of each.

A field made by `option` carries its help, group, choices and rule. From these follow
the rows of the command, the check of values, and the documentation.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


class OptionError(ValueError):
    """A wrong value of an option, or options that exclude each other.

    Args:
        text: the message; names of options are in braces, as in ``"{steps} must be at
            least 1, got 0."``.
    """

    def __init__(self, text: str):
        super().__init__(re.sub(r"\{(\w+)\}", r"\1", text))
        self.text = text

    @property
    def as_typed(self) -> str:
        """The message with names of options as the command spells them."""
        return re.sub(r"\{(\w+)\}", lambda name: flag(name[1]), self.text)


# The largest number of float32, and the smallest of full precision above 0.
FINITE, TINY = float.fromhex("0x1.fffffep127"), 2.0**-126
# Rules for values, by the words that an error has for them.
RULES: dict[str, Callable[[Any], bool]] = {
    "at least 2": lambda x: x >= 2,
    "at least 1": lambda x: x >= 1,
    "at least 0": lambda x: x >= 0,
    "1 to 8192": lambda x: 1 <= x <= 8192,
    "1, 2, 4 or 8": lambda x: x in (1, 2, 4, 8),
    "at least 0 and below 2**63": lambda x: 0 <= x < 2**63,
    "finite in float32": lambda x: abs(x) <= FINITE,
    "finite in float32 and at least 0": lambda x: 0 <= x <= FINITE,
    "finite in float32 and above 0": lambda x: TINY <= x <= FINITE,
    "0 to 2, as distances of unit vectors": lambda x: 0 <= x <= 2,
    "0 to 1": lambda x: 0 <= x <= 1,
    "above 0 and below 1": lambda x: 0 < x < 1,
    "at least 0 and below 1": lambda x: 0 <= x < 1,
    "shares from 0 to 1 with top < bottom and left < right": (
        lambda box: 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1
    ),
    "a .csv file": lambda path: path.suffix == ".csv",
    "a .png file": lambda path: path.suffix == ".png",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """Declaration of an option, in the metadata of its field.

    Attributes:
        help: noun phrase or imperative that makes sense without the option's name.
        group: title of its group in the help; None for no group.
        choices: words that are accepted; None for any value.
        rule: rule of `RULES` for values other than None.
        metavar: name of the value in the help; by the type if None.
        task: "classes" or "triplets" if the option requires that task; None for both.
        positional: whether the command takes the values without a name.
        in_command: whether the command has the option.
    """

    help: str
    group: str | None = None
    choices: tuple[str, ...] | None = None
    rule: str | None = None
    metavar: str | None = None
    task: str | None = None
    positional: bool = False
    in_command: bool = True


def option(
    help: str, *, default: Any = None, required: bool = False, **declaration: Any
) -> Any:
    """Declare a field of a dataclass as an option; see `Option`."""
    metadata = {"option": Option(help=help, **declaration)}
    if required:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def options_of(cls: Any) -> Iterator[tuple[dataclasses.Field, Option]]:
    """The fields of a dataclass that are options, with their declarations."""
    for field in dataclasses.fields(cls):
        if "option" in field.metadata:
            yield field, field.metadata["option"]


def flag(name: str) -> str:
    """The spelling of an option in the command: ``--per-class`` for ``per_class``."""
    return f"--{name.replace('_', '-')}" if len(name) > 1 else f"-{name}"


def help_of(field: dataclasses.Field) -> str:
    """The help of an option, with its default."""
    text, default = field.metadata["option"].help, field.default
    shown = isinstance(default, int | float | str) and not isinstance(default, bool)
    return f"{text} (default: {default})" if shown else text


def text_of(value: Any) -> str:
    """A value in an error: a path as it was given, others as Python writes them."""
    return repr(os.fspath(value)) if isinstance(value, os.PathLike) else repr(value)


def check_options(values: Any) -> None:
    """Check each option of a dataclass by its own choices and rule.

    Raises:
        OptionError: if a value is neither None nor allowed.
    """
    for field, declared in options_of(values):
        value = getattr(values, field.name)
        if value is None:
            continue
        if declared.choices is not None and value not in declared.choices:
            rule = f"one of {', '.join(declared.choices)}"
        elif declared.rule is not None and not RULES[declared.rule](value):
            rule = declared.rule
        else:
            continue
        raise OptionError(f"{{{field.name}}} must be {rule}, got {text_of(value)}.")


def documented(cls: type[T]) -> type[T]:
    """Add the help of every option to the docstring of its dataclass."""
    lines = (f"    {field.name}: {help_of(field)}." for field, _ in options_of(cls))
    cls.__doc__ = "\n".join([f"{cls.__doc__}\n\nAttributes:", *lines])
    return cls
