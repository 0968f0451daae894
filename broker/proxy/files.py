"""Small files that somebody else writes."""

import os
import stat


def read_small(path: str | bytes, limit: int, *, folder: int | None = None) -> bytes:
    """Return what is in a file, or in one of the folder with that descriptor. Raises OSError.

    It must be a file, and not larger than `limit`. A pipe at its path does not make us wait.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY, dir_fd=folder)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(None, "not a file")
        data = b""
        while more := os.read(fd, limit + 1 - len(data)):
            data += more
    finally:
        os.close(fd)
    if len(data) > limit:
        raise OSError(None, f"more than {limit} bytes")
    return data
