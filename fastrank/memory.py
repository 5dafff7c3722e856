"""What the C library does with memory that is freed."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for the next allocation; False where there is no glibc.

    By default it gives large blocks back at once, and every activation of the next step is paid for
    again by a page fault for each 4 KiB: 18,000 a step, a tenth of its time, for 8 clients side by
    side in an encoder of 6 layers. The process then holds its highest use until it ends.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    # all of it, not most: either threshold alone leaves the other to give memory back
    return bool(mallopt(_M_MMAP_THRESHOLD, 1 << 30)) & bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
