"""Parts of several commands: messages, tables, checks of files, and indexes."""

import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from tripletjax.learn.errors import first_line, install_command, text_of_error
from tripletjax.learn.runs.options import OptionError, flag

if TYPE_CHECKING:
    from tripletjax.apps.search import Changes, Index
    from tripletjax.cli.options import (
        Cluster,
        EmbedderOptions,
        Identify,
        Options,
        Search,
        Serve,
    )
    from tripletjax.learn.embedder import ImageEmbedder

# Errors that one line explains.
FAULTS = (
    *(ValueError, OSError, ImportError, FloatingPointError),
    *(MemoryError, jax.errors.JaxRuntimeError),
)
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def message_of(error: BaseException, options: "type[Options]") -> str:
    """The message of an error, as the user of a command reads it.

    Args:
        error: any error.
        options: options of the command.
    """
    if isinstance(error, OptionError):
        return error.as_typed
    if isinstance(error, ModuleNotFoundError):
        return f"{error}: it needs {install_command(options.extras)}."
    if isinstance(error, MemoryError):
        return f"not enough memory: {first_line(error)}"
    if isinstance(error, jax.errors.JaxRuntimeError):
        code, _, text = first_line(error).partition(": ")
        if code == "RESOURCE_EXHAUSTED":
            return f"not enough memory: {text}"
        return f"JAX failed: {code}: {text}"
    return as_typed(text_of_error(error), options.names())


def as_typed(message: str, names: Collection[str]) -> str:
    """The message of an error with its subject as the command spells it.

    Args:
        message: such as ``"classes must be at least 2, got 1."``.
        names: of the options of the command.
    """

    def spell(word: re.Match) -> str:
        return flag(word[0]) if word[0] in names else word[0]

    subject = re.match(r"\w+(?: \+ \w+)*(?= (?:must|requires|cannot)\b)", message)
    if subject is None:
        return message
    return re.sub(r"\w+", spell, subject[0]) + message[subject.end() :]


def shown(path: Path) -> str:
    """The text of a path that need not be UTF-8."""
    return one_line(os.fsencode(path).decode(errors="replace"))


def one_line(text: str) -> str:
    """A text with escapes for line breaks and other control characters of names."""
    return CONTROL.sub(lambda match: repr(match[0])[1:-1], text)


def print_table(
    title: str,
    rows: Mapping[str, float | None],
    unit: str = "",
    *,
    beside: Mapping[str, float | None] | None = None,
) -> None:
    """Print a title and a line for each row, with the values of `beside` next to it."""
    print(f"\n{title}")
    for name, value in rows.items():
        columns = [value] if beside is None else [value, beside.get(name)]
        texts = ["-" if one is None else f"{one:.2f}{unit}" for one in columns]
        print(f"  {name:<24}" + "".join(f"{text:>10}" for text in texts))


def check_images(images: Iterable[Path]) -> None:
    """Raise FileNotFoundError if an image does not exist."""
    for image in images:
        if not image.is_file():
            raise FileNotFoundError(f"there is no image {image}.")


def check_distinct(*files: Path | None) -> None:
    """Raise ValueError if two outputs of a command are one file."""
    paths = [file.resolve() for file in files if file is not None]
    for file in files:
        if file is not None and paths.count(file.resolve()) > 1:
            raise ValueError(f"{file} must be one output alone; give another file.")


def check_new(*files: Path | None) -> None:
    """Raise FileExistsError if one of the files exists, ValueError if two are one."""
    check_distinct(*files)
    for file in files:
        if file is not None and file.exists():
            raise FileExistsError(f"{file} already exists; give another file.")


def open_embedder(options: "EmbedderOptions") -> "ImageEmbedder":
    """The embedder of ``--run`` or ``--embedder``."""
    from tripletjax.apps import embedders

    if options.embedder is None:
        assert options.run is not None
        return embedders.embedder_of(options.run)
    return embedders.open_embedder(
        options.embedder,
        size=options.embedder_size,
        mean=options.embedder_mean,
        std=options.embedder_std,
    )


def updated_index(
    folder: Path,
    options: "Search | Identify | Cluster | Serve",
    embedder: "ImageEmbedder",
) -> tuple["Index", "Changes"]:
    """Update the index of a folder; return it and its changes."""
    from tripletjax.apps import search

    database = options.database or options.home / "index"
    index = search.Index(folder, database, embedder)
    changes = index.update(
        progress=True,
        waiting=lambda: print("another process updates an index here: waiting for it"),
        remove_missing=options.remove_missing,
    )
    print(changes)
    if options.run is None:
        print(f"index: {shown(database)}")
    for line in (*changes.notes, *changes.skipped):
        print(f"- {one_line(line)}")
    return index, changes
