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

from data_sharding.common.errors import RequestError, show
from data_sharding.common.files import open_to_append

# How many seconds to wait for a lock, if its owner is on this host, and if its owner is on another host. The owner may
# have been killed. If the owner was on this host, its lock soon becomes free. If the owner was on another host, the
# lock can stay taken for a minute or more, because the file server must first notice that the owner has ended.
_SAME_HOST_S, _OTHER_HOST_S = 10, 120


def hold_lock(path: Path) -> IO[str]:
    """Lock a file until the returned file object is closed or this process ends.

    Parameters
    ----------
    path : Path
        The lock file. It contains the process id and the host of the lock's owner. The file is created if it is
        missing.

    Returns
    -------
    file object
        The opened lock file. Close this file to release the lock.

    Raises
    ------
    RequestError
        If another process holds the lock and does not release it while this function waits, or if the path is a
        symbolic link or not a file.
    """
    # The package filelock is not used, because it does not say which process holds a lock. With filelock, `hold_lock`
    # would still need its own code to store the owner's name, to wait, and to write the message. A POSIX lock works
    # between hosts that share a network disk. A POSIX lock is released when its process ends, and forked processes do
    # not inherit it.
    stream = os.fdopen(open_to_append(path), "a+")
    waited = 0
    while True:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            # Errors other than EAGAIN and EACCES mean that the file system does not support locks, so continue without
            # a lock.
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                break
        stream.seek(0)
        owner = show(stream.read(200))
        if not waited:
            print(f"dreamscale: {path.parent} is in use by {owner}; waiting for it to end", file=sys.stderr)
        if waited >= (_SAME_HOST_S if owner.endswith(f" {socket.gethostname()}") else _OTHER_HOST_S):
            raise RequestError(
                f"{path.parent}: {owner} is using this run; stop that process first, or choose another output "
                f"(if that process does not exist any more, delete {path})"
            )
        time.sleep(1)
        waited += 1
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {socket.gethostname()}")
    stream.flush()
    return stream
