"""Memory that a training step frees stays with the process, for the next step to take again.

A step on a CPU allocates and frees the same tensors over and over. glibc hands large blocks back to the
system at once, and each of their pages then costs a page fault when it is taken again: a tenth of a step.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Names of mallopt's parameters, from malloc.h."""


def keep_freed_memory() -> None:
    """From now on, in this process, with glibc; does nothing where there is another allocator."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    # The largest that it takes; blocks above are few.
    mallopt(_MMAP_THRESHOLD, 32 * 2**20)
