"""Errors of dependencies as one line."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

# Errors of a folder that cannot be written.
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def one_line_errors(folder: Path, action: str) -> Iterator[None]:
    """Raise errors of tensorflow-datasets as one line with the folder.

    Args:
        folder: of the data.
        action: the action that fails, such as "written".

    Raises:
        OSError: with advice if the folder cannot be written, or with the first line of
            another error. OSErrors of other causes, ValueErrors and ImportErrors pass.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise OSError(
            f"data cannot be {action} in {folder}: {error.strerror}. Set TFDS_DATA_DIR "
            "to a folder that can be written."
        ) from error
    except (ValueError, ImportError, FloatingPointError):
        raise
    except Exception as error:
        raise OSError(
            f"data in {folder} cannot be {action}: {first_line(error).rstrip('.')}. If "
            "they are damaged, remove this folder."
        ) from error


def install_command(extras: str) -> str:
    """The command that installs extras of this package, for errors."""
    return f'pip install -e ".[{extras}]" in a copy of the repository of tripletjax'


def text_of_error(error: BaseException) -> str:
    """The message of an error; one of the operating system begins with the file."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    reason = error.strerror[:1].lower() + error.strerror[1:]
    if error.filename is None:
        return reason
    return f"{os.fsdecode(error.filename)}: {reason}"


def first_line(error: BaseException) -> str:
    """The first line of an error; some print whole trees of arrays."""
    first = str(error).strip().partition("\n")[0] or repr(error)
    return first if len(first) <= 200 else first[:200] + "..."
