"""Parsing of arguments, the call of a command, and its exit status.

The exit status is 0, 2 for wrong use or bad input, with one line on stderr, or 130 for
an interrupt. It is 141 if a program such as head has closed the output.
"""

import _thread
import argparse
import contextlib
import importlib
import inspect
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

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
    with _replacing_characters(), _keeping_interrupts():
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


@contextlib.contextmanager
def _keeping_interrupts() -> Iterator[None]:
    """Interrupt again where Python drops a KeyboardInterrupt.

    Python prints and drops exceptions in callbacks, such as those of weak references.
    """
    before = sys.unraisablehook

    def interrupt_later() -> None:
        time.sleep(0.05)
        _thread.interrupt_main()

    def hook(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            # Later, since an interrupt of this hook would be dropped, too.
            _thread.start_new_thread(interrupt_later, ())
        else:
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


class _Parser(argparse.ArgumentParser):
    """Parser whose errors are one line, and whose values may be ``-1e-3``."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        # Python before 3.14 takes negative numbers with exponents for options.
        self._negative_number_matcher = re.compile(r"-\.?\d")

    def error(self, message: str) -> NoReturn:
        text = re.sub(r"^argument (\S+): must ", r"\1 must ", message)
        text = one_line(text.removeprefix("argument "))
        self.exit(2, f"{self.prog}: {text}; see {self.prog} --help.\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
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
        status = command.call(options)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Python flushes the output at its end, which would fail again.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except FAULTS as error:
        message = one_line(message_of(error, COMMANDS[name]))
        print(f"{prog}: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{prog}: stopped.", file=sys.stderr)
        return 130
