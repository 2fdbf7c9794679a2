"""One process at a time works in a directory: the lock is the kernel's, the file's text is for people."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .about import now
from .directory import LOCK, RunError

logger = logging.getLogger(__name__)

HELD = (errno.EACCES, errno.EAGAIN)

NONE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What file systems say that have no locks: some network ones, as they are mounted."""


class InUseError(RunError):
    """Another process works in a directory; the message says which, and since when."""


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the directory for this process; the kernel lets go when it dies, however that happens.

    Raises:
        InUseError: another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK).open("a+") as file:
        try:
            # Not flock: loader processes would inherit it, and outlive a killed run by seconds.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD:
                file.seek(0)
                owner = file.read().strip() or "another process"
                raise InUseError(
                    f"{directory} is in use by {owner}: wait until it ends, or give another --dir"
                ) from None
            if error.errno not in NONE:
                raise
            logger.warning(
                "%s: its file system has no locks (%s), so nothing keeps you from starting the same once more, which "
                "would spoil both",
                directory,
                error.strerror,
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {now()}\n")
        file.flush()
        yield
