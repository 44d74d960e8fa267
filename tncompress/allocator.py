"""How the C library keeps the memory of large tensors: a setting for a process of one's own."""

from __future__ import annotations

import ctypes
import platform

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, MMAP_MAX = -1, -2, -3, -4
"""What ``mallopt`` of glibc calls its parameters (``malloc.h``, ``man 3 mallopt``)."""
LARGEST, PAD = 1 << 30, 1 << 28
"""Up to how many bytes are kept, and how many more are asked for at once; the advised variables hold both."""

_kept = False


def keep_memory() -> bool:
    """Let glibc keep the memory of large tensors in this process; return whether it does.

    By default glibc hands back to the system what a tensor of more than 32 MiB held, and the next one has to
    be mapped and zeroed anew, page by page. On the large feature maps of a compressed network that can take
    nearly as long as the convolutions: see ``docs/benchmarks.md``. After this call up to 1 GiB a tensor is
    kept for the next one, dense models are faster, too, and the process gives back less memory before it
    ends. It is the same as the three ``MALLOC_`` variables of the speed settings, without a new start of
    Python.

    It holds for the whole process and for all libraries in it, and can't be taken back; nothing here calls it
    for you. Call it first, before there are models. False, and nothing changed, on systems whose C library is
    another (macOS, Windows, musl). It has no effect where another allocator was loaded before (jemalloc,
    tcmalloc).
    """
    global _kept
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # older versions take no threshold of more than 32 MiB: then nothing is mapped by itself
    mapped = mallopt(MMAP_THRESHOLD, LARGEST) or mallopt(MMAP_MAX, 0)
    _kept = bool(mapped and mallopt(TRIM_THRESHOLD, LARGEST) and mallopt(TOP_PAD, PAD))
    return _kept


def keeps_memory() -> bool:
    """Say whether :func:`keep_memory` was called here, and did something."""
    return _kept
