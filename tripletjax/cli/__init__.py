"""The command ``tripletjax``: parses, calls, prints."""

from tripletjax.cli.main import main

__all__ = ["main"]
