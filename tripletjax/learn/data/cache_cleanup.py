"""The folder of decoded images: which are in use, and which are left over.

Every entry is a folder that holds ``lock``, which all processes that use it hold until
they end, and, once it is complete, ``sources.json``: what it was made of. Where files
cannot be locked, as on Windows, nothing is cleaned up.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tripletjax.learn.errors import UNWRITABLE

try:
    import fcntl
except ImportError:
    fcntl = None


LOCK, SOURCES = "lock", "sources.json"
# What an interrupted decoding leaves behind.
INCOMPLETE = "*/incomplete.*"
# Descriptors of the locks of the entries that this process uses.
_held: dict[Path, int] = {}


def hold(entry: Path) -> list[str]:
    """Makes an entry, if there is none, and keeps others from removing it.

    One that can only be read is held, too.

    Returns:
        What was removed of what an interrupted decoding has left in it.
    """
    entry = entry.resolve()
    if entry in _held and _is_there(_held[entry], entry / LOCK):
        return []
    while True:
        entry.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.open(entry / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno not in UNWRITABLE or not (entry / LOCK).exists():
                raise
            lock = os.open(entry / LOCK, os.O_RDONLY)
        left = list(entry.glob(INCOMPLETE)) if _lock(lock, alone=True) else []
        told = [_removed("what an interrupted decoding had left", x) for x in left]
        _lock(lock)
        # It may have been removed before it was locked.
        if _is_there(lock, entry / LOCK):
            _held[entry] = lock
            return told
        os.close(lock)


def tidy(entry: Path, source: str) -> list[str]:
    """Removes what nobody needs and no living process uses.

    That is earlier states of what an entry was made of, and what interrupted decodings
    have left behind.

    Args:
        entry: that is held, and complete.
        source: what it was made of, such as the path of a folder.

    Returns:
        What was removed, and how large the folder of entries is.
    """
    entry, told = entry.resolve(), []
    if source not in (sources := _sources(entry)):
        _note(entry, sources | {source})
    for other in sorted(entry.parent.iterdir()):
        sources = _sources(other)
        needed = bool(sources) and source not in sources
        if needed or other in _held or not (other / LOCK).exists():
            continue
        with _alone(other) as alone:
            if not alone:
                continue
            if sources - {source}:
                _note(other, sources - {source})
            elif sources:
                told.append(_removed("an earlier copy of these images", other))
            else:
                told.append(_removed("what an interrupted decoding had left", other))
    sizes = _megabytes(entry), _megabytes(entry.parent)
    told.append(
        f"decoded images are kept in {entry} ({sizes[0]}; of all datasets {sizes[1]})"
    )
    return told


def _removed(what: str, folder: Path) -> str:
    told = f"removed {what}: {folder} ({_megabytes(folder)})"
    shutil.rmtree(folder)
    return told


def _megabytes(folder: Path) -> str:
    size = 0
    for file in folder.rglob("*"):
        # Another process may remove it just now.
        with contextlib.suppress(OSError):
            size += file.stat().st_size if file.is_file() else 0
    return f"{size / 1e6:,.1f} MB"


@contextlib.contextmanager
def _alone(entry: Path) -> Iterator[bool]:
    """Whether no living process uses an entry; meanwhile none begins to."""
    try:
        lock = os.open(entry / LOCK, os.O_RDWR)
    except OSError:
        # It is gone, or can only be read.
        yield False
        return
    try:
        yield _lock(lock, alone=True)
    finally:
        os.close(lock)


def _lock(lock: int, *, alone: bool = False) -> bool:
    """Locks for itself alone, if that can be had at once, or with others."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
    except OSError:
        # Somebody has it, or the file system has no locks.
        return False
    return True


def _is_there(lock: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except FileNotFoundError:
        return False


def _sources(entry: Path) -> set[str]:
    try:
        return set(json.loads((entry / SOURCES).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return set()


def _note(entry: Path, sources: set[str]) -> None:
    part = entry / f"{SOURCES}.{os.getpid()}"
    part.write_text(json.dumps(sorted(sources)), encoding="utf-8")
    part.replace(entry / SOURCES)
