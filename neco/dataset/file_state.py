"""What the file system says of a file, and how far that tells whether it is still the same.

A file system's `ctime` is the time at which an inode was last changed: no program can set it back, so a file that is
replaced, edited or restored has another one, whatever its size and time of change. That fails in two cases.

1. File systems without it show another time in its place: squashfs, ISO 9660, FAT and sshfs show `mtime`, in whole
   seconds. `is_telling` is False there.
2. Clocks of file systems go by steps, so that a file may change twice at the same time. `is_settled` is False so long.

A mount of an object store that shows the object's own time, with fractions of a second, as `ctime` and `mtime` cannot
be told from a disk: an object that is replaced by another one of the same size and time goes unnoticed there.
"""

import os
import time

State = tuple[int, int, int, int]  # inode, bytes, and in ns the last change of the content and of the inode
STEP = 10**8, 2 * 10**9  # ns: of clocks that show fractions of a second, and of those that do not


def state_of(status: os.stat_result) -> State:
    return status.st_ino & (1 << 63) - 1, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def is_telling(state: State) -> bool:
    """Whether the file system gives another state to any file that is put into the place of this one."""
    inode, _, modified, changed = state
    return inode != 0 and (changed % 10**9 != 0 or changed != modified)


def is_settled(state: State) -> bool:
    """Whether a file that changes from now on will have another state; to be asked before the file is read."""
    return state[3] < time.time_ns() - STEP[state[3] % 10**9 == 0]
