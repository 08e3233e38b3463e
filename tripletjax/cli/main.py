"""Parsing of arguments, the call of a command, and its exit status.

The exit status is 0, 2 for wrong use or bad input, with one line on stderr, or 130 for
an interrupt.
"""

import argparse
import contextlib
import importlib
import inspect
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import tripletjax as tj
from tripletjax.cli import compile_cache
from tripletjax.cli.common import FAULTS, message_of, one_line
from tripletjax.cli.options import COMMANDS


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments; those of the process if not given.

    Returns:
        The exit status.
    """
    with _replacing_characters():
        return _main(sys.argv[1:] if argv is None else argv)


@contextlib.contextmanager
def _replacing_characters() -> Iterator[None]:
    """Print replacement characters for those that the output cannot encode."""
    streams: list[Any] = [sys.stdout, sys.stderr]
    before = [(x, x.errors) for x in streams if hasattr(x, "reconfigure")]
    for stream, errors in before:
        if errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")
    try:
        yield
    finally:
        for stream, errors in before:
            stream.reconfigure(errors=errors)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="tripletjax",
        description="Train embeddings of images with triplet losses, and use them.",
        epilog="tripletjax COMMAND --help describes the options of a command.",
    )
    parser.add_argument("--version", action="version", version=tj.__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")
    for name, options in COMMANDS.items():
        summary, _, epilog = (inspect.getdoc(options) or "").partition("\n\n")
        command = commands.add_parser(
            name, help=summary, description=summary, epilog=epilog
        )
        options.add_to(command)
    return parser


def _main(argv: Sequence[str]) -> int:
    values = vars(build_parser().parse_args(argv))
    name = values.pop("command")
    prog = f"tripletjax {name}"
    try:
        options = COMMANDS[name].of(values)
        compile_cache.keep_programs()
        # Its imports take seconds, and need extras.
        command: Any = importlib.import_module(f"tripletjax.cli.{name}")
        return command.call(options)
    except FAULTS as error:
        message = one_line(message_of(error, COMMANDS[name].extras))
        print(f"{prog}: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{prog}: stopped.", file=sys.stderr)
        return 130
