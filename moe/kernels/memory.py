"""Allocators told how a training step uses memory: the C library's to keep what is freed, CUDA's to let segments grow."""

from __future__ import annotations

import ctypes
import os

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


# by which a user sets up torch's allocator; torch 2.11 to 2.13 read them all, on NVIDIA the first and last
SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
# NCCL registers the allocator's segments with it; torch switches it off where segments grow, so who asks for it keeps them fixed
REGISTERED = "TORCH_NCCL_USE_TENSOR_REGISTER_ALLOCATOR_HOOK"


def expandable_segments() -> bool:
    """Let segments of torch's CUDA allocator grow, so that tokens per expert that change each step do not fragment it.

    False, and nothing is changed, where the user has set any of `SETTINGS`, or asks NCCL to register the allocator's segments.
    Call it before the first tensor on a GPU. Memory of such segments cannot be handed to another process by CUDA IPC on every
    driver; nothing here does that.
    """
    import torch

    if any(name in os.environ for name in SETTINGS) or os.environ.get(REGISTERED, "0") not in ("", "0", "false", "False"):
        return False
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    return True
