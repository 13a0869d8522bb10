"""A lock that keeps two commands from writing into one run directory."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
import time
from pathlib import Path
from typing import IO

from data_sharding.common.errors import RequestError

# How long to wait for a lock before giving up. The owner may have been killed a moment ago; the lock of a killed
# process on another host is released only when the file server notices.
_SAME_HOST_S, _OTHER_HOST_S = 10, 120


def hold_lock(path: Path) -> IO[str]:
    """Lock a file until it is closed or this process ends.

    Parameters
    ----------
    path : Path
        The lock file; created if it is missing. It holds the name of the lock's owner.

    Returns
    -------
    file object
        Close it to release the lock.

    Raises
    ------
    RequestError
        If another process holds the lock and does not release it in time.
    """
    # The package filelock is not used: it does not tell who holds a lock. The name of the owner, the waiting and the
    # message below would still be needed, and little would be left for the package to do. A POSIX lock, as here, works
    # between the hosts of a network disk, ends with its process, and is not inherited by forked reading processes.
    stream = path.open("a+")
    waited = 0
    while True:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            # Any other error: this file system does not support locks, so continue without a lock.
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                break
        stream.seek(0)
        owner = stream.read().strip()
        if not waited:
            print(f"dreamscale: {path.parent} is in use by {owner}; waiting for it to end", file=sys.stderr)
        if waited >= (_SAME_HOST_S if owner.endswith(f" {socket.gethostname()}") else _OTHER_HOST_S):
            raise RequestError(
                f"{path.parent}: {owner} is at work on this run; stop that process first, or choose another output "
                f"(if that process does not exist any more, delete {path})"
            )
        time.sleep(1)
        waited += 1
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {socket.gethostname()}")
    stream.flush()
    return stream
