"""Entries of the folder of decoded images: made once, removed when stale.

An entry is a folder whose name is a digest of its content. The lock ``NAME.lock``
beside an entry is held while a process makes or removes the entry. In ``users``, each
process holds a lock until it ends. In ``sources`` lies a file for each source that the
entry was made from, such as a folder of images.
"""

import contextlib
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import filelock
from tqdm import tqdm

from tripletjax.learn.errors import UNWRITABLE
from tripletjax.learn.files import digest_of

SOURCES, USERS = "sources", "users"
# Folders that an interrupted decode leaves behind.
INCOMPLETE = "*/incomplete.*"
# The lock of each entry that this process uses.
_used: dict[Path, filelock.BaseFileLock] = {}


@contextlib.contextmanager
def open_entry(entry: Path, source: str, *, progress: bool) -> Iterator[list[str]]:
    """Lock an entry while the body makes it, and keep it until this process ends.

    A second process waits for the first. A complete entry in a folder that cannot be
    written is used without a lock.

    Args:
        entry: the folder, created if it does not exist.
        source: what the entry is made from, such as the path of a folder.
        progress: whether to print that another process is waited for.

    Yields:
        Lines about the leftovers that were removed.
    """
    sources = entry / SOURCES
    try:
        entry.mkdir(parents=True, exist_ok=True)
        lock = _acquire(entry, progress)
    except OSError as error:
        if error.errno not in UNWRITABLE or not sources.exists():
            raise
        yield []
        return
    with lock:
        leftovers = [*entry.glob(INCOMPLETE)]
        yield [_remove("leftovers of an interrupted decode", one) for one in leftovers]
        sources.mkdir(exist_ok=True)
        _mark(entry, source).touch()
        if entry not in _used:
            (entry / USERS).mkdir(exist_ok=True)
            _used[entry] = filelock.FileLock(entry / USERS / f"{uuid.uuid4().hex}.lock")
            _used[entry].acquire()


def remove_stale(entry: Path, source: str) -> list[str]:
    """Remove earlier entries of a source, and leftovers of interrupted decodes.

    Entries that another source needs or a living process uses stay.

    Args:
        entry: the entry that the source needs now.
        source: as in `open_entry`.

    Returns:
        Lines about the removed entries, and the size of the whole folder.
    """
    notes = []
    for other in sorted(path for path in entry.parent.iterdir() if path.is_dir()):
        if other == entry:
            continue
        # A lock that is not free belongs to a process that makes the entry.
        with contextlib.suppress(OSError), filelock.FileLock(_lock_of(other), 0):
            _mark(other, source).unlink(missing_ok=True)
            if not any(other.glob(f"{SOURCES}/*")) and not _is_used(other):
                notes.append(_remove("an earlier copy of images", other))
    sizes = _megabytes(entry), _megabytes(entry.parent)
    notes.append(
        f"decoded images are kept in {entry} ({sizes[0]}; of all datasets {sizes[1]})"
    )
    return notes


def _lock_of(entry: Path) -> Path:
    return entry.with_name(f"{entry.name}.lock")


def _acquire(entry: Path, progress: bool) -> filelock.AcquireReturnProxy:
    """Acquire the lock of an entry, to be released by a with statement."""
    lock = filelock.FileLock(_lock_of(entry))
    try:
        return lock.acquire(timeout=0)
    except filelock.Timeout:
        if progress:
            message = "waiting for another process that decodes these images"
            tqdm.write(message, file=sys.stderr)
        return lock.acquire()


def _mark(entry: Path, source: str) -> Path:
    """The file that says that a source needs an entry."""
    return entry / SOURCES / digest_of([source])


def _is_used(entry: Path) -> bool:
    """Whether a living process uses an entry."""
    if entry in _used:
        return True
    try:
        for file in (entry / USERS).glob("*.lock"):
            with filelock.FileLock(file, timeout=0):
                pass
    except filelock.Timeout:
        return True
    return False


def _remove(what: str, folder: Path) -> str:
    size = _megabytes(folder)
    shutil.rmtree(folder)
    return f"removed {what}: {folder} ({size})"


def _megabytes(folder: Path) -> str:
    size = 0
    for file in folder.rglob("*"):
        # Another process may remove the file meanwhile.
        with contextlib.suppress(OSError):
            size += file.stat().st_size if file.is_file() else 0
    return f"{size / 1e6:,.1f} MB"
