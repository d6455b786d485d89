"""The C library's allocator, told to keep what a training step frees: the next step wants the same again."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # M_… of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Ask glibc to reuse large freed blocks instead of handing them back to the kernel; False where it cannot be asked.

    By default every large tensor is a fresh mapping, and a CPU step page-faults hundreds of MiB of gradients. The process
    then stays as large as its largest step. Call it at the start of a process, before large tensors exist.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        return False
    return all(mallopt(option, value) == 1 for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 64 << 20)))
