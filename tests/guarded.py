"""Memory between pages that must not be touched, and a process of its own for who may touch them."""

import ctypes
import mmap
import subprocess
import sys

import torch

SIZE = 64 * mmap.PAGESIZE  # bytes of each


def memories(count: int) -> list[torch.Tensor]:
    """So many 1-d float32 tensors of SIZE bytes; who touches the page before or behind one is killed."""
    page, libc = mmap.PAGESIZE, ctypes.CDLL(None, use_errno=True)
    area = mmap.mmap(-1, count * SIZE + (count + 1) * page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(area))
    starts = [index * (page + SIZE) for index in range(count + 1)]
    for start in starts:
        assert libc.mprotect(ctypes.c_void_p(base + start), page, 0) == 0
    whole = memoryview(area)
    return [torch.frombuffer(whole[start + page :][:SIZE], dtype=torch.float32) for start in starts[:-1]]


def run_alone(script: str) -> int:
    """The number that a script prints at its end, run in a process of its own, which must survive."""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return int(run.stdout)
