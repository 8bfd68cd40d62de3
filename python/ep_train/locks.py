"""Locks between processes: the file ``.lock`` in a folder, which one process at a time holds with ``flock``.

It is a file of its own, opened for writing: over NFS a lock of the folder itself, or of what is only read, keeps nobody
on another machine out. It stays where it is: removed, it could not be told from a new one by who waits for it. The
system gives a lock up when its process ends, however that happens. (The lock of a machine that is lost is given up by
the file server, when its lease is over.)
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
# Of a system or a file system without locks, or of one that nobody can write to. Whatever else goes wrong says nothing
# about whether somebody else is there.
NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EROFS})


def take(folder: Path, *, wait: bool = False) -> int:
    """Lock a folder. What is another user's, and so only read, is locked all the same: on this machine, not over NFS.

    Args:
        wait: until another process gives it up.

    Returns:
        A descriptor: to close it gives the lock up.

    Raises:
        BlockingIOError: another process holds it.
        OSError: it cannot be locked; one of ``NO_LOCKS``: nothing can be, there.
    """
    refused = None
    try:
        descriptor = os.open(folder / LOCK, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    except PermissionError as error:
        refused = error
        try:
            descriptor = os.open(folder / LOCK, os.O_RDONLY)
        except OSError:
            raise error from None
    try:
        lock(descriptor, wait=wait)
    except BaseException as error:
        os.close(descriptor)
        if refused is not None and isinstance(error, OSError) and error.errno == errno.EBADF:  # what NFS says
            raise refused from error
        raise
    return descriptor


def lock(descriptor: int, *, wait: bool = False) -> None:
    """Lock a file that is open for writing, until it is closed; see :func:`take`."""
    if fcntl is None:
        raise OSError(errno.ENOLCK, "this system has no flock")
    fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
