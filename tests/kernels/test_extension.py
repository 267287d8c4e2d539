"""The C extension: what it refuses, that it stays inside its maps, and that everything works without it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from padfree import kernels
from padfree.kernels import extension
from tests.guarded import run_alone

built = pytest.mark.skipif(not kernels.available(), reason="the C extension was not built")


def test_it_says_what_is_there(monkeypatch):
    assert kernels.available() == (extension.native is not None)
    assert kernels.describe().startswith("C kernels: available" if kernels.available() else "C kernels: missing")
    monkeypatch.setattr(extension, "native", None)
    assert not kernels.available()
    assert "missing" in kernels.describe() and "torch's own" in kernels.describe()


def test_the_folder_knows_torch_and_nothing_else_of_padfree():
    code = (
        "import sys, types, torch, torch.autograd.forward_ad, torch._library, torch._dynamo;"
        "package = sys.modules['padfree'] = types.ModuleType('padfree');"
        "package.__path__ = [sys.argv[1]]; import padfree.kernels;"
        "print(sorted(n for n in sys.modules if n.startswith('padfree.') and not n.startswith('padfree.kernels')))"
    )
    folder = extension.__file__.rsplit("/", 2)[0]
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@built
@pytest.mark.parametrize("wrong", [(7, 2, 0), (3, 3, 0), (3, 2, 2), (3, 2, -1)])
def test_it_pools_no_other_windows(wrong):
    functions = (extension.native.max_pool, extension.native.max_pool_taps, extension.native.max_pool_backward)
    for addresses, function in zip(((1, 1), (1, 1, 1), (1, 1, 1)), functions, strict=True):
        with pytest.raises(ValueError, match="windows of 3 or 5"):
            function(*addresses, 1, 9, 9, 1, *wrong, 1)
        with pytest.raises(ValueError, match="without memory"):
            function(*addresses[:-1], 0, 1, 9, 9, 1, 3, 2, 0, 1)


@built
def test_it_makes_no_chain_that_does_not_fit():
    """(stride, pool, its padding, place of the maxima, outputs, residual): refused before any address is used."""
    none = (0, -1.0, 1.0)

    def made(stride=2, pool=3, pool_padding=0, place=1, outputs=0, residual=0, height=9, threads=1):
        convolution = (1, 0, 0, 0, 3, stride, 0)
        point = (1 if outputs else 0, 0, outputs, *none)
        sizes = (0, 1, 4, height, 9)
        pooled = (pool, pool_padding, place)
        return extension.native.chain(1, 1, sizes, (-1, 0.0, 0.0), convolution, none, pooled, point, residual, threads)

    assert not made(stride=3) and not made(stride=0) and not made(height=2) and not made(threads=0)
    assert not made(pool=7) and not made(pool=5) and not made(pool_padding=1) and not made(pool_padding=-1)
    assert not made(pool=0, place=1) and not made(place=0)  # maxima that do not exist, or go nowhere
    assert not made(residual=1) and not made(outputs=5, residual=2) and not made(outputs=4, residual=1)
    with pytest.raises(ValueError, match="without memory"):
        extension.native.chain(
            1, 0, (0, 1, 4, 9, 9), none, (1, 0, 0, 0, 3, 2, 0), none, (0, 0, 0), (0, 0, 0, *none), 0, 1
        )


@built
@pytest.mark.skipif(sys.platform != "linux", reason="guards memory by mprotect")
def test_it_stays_inside_its_maps():
    """Maps end at, and begin after, a page that must not be touched; a step outside kills the process."""
    script = """
import itertools
import torch
import torch.nn.functional as F
from padfree import kernels
from padfree.kernels import extension, pool
from tests.guarded import memories
first, second = memories(2)
chain_module = __import__("sys").modules["padfree.kernels.chain"]

def place(memory, shape, strides, end):
    begin = memory.numel() - torch.Size(shape).numel() if end else 0
    return memory.as_strided(shape, strides, memory.storage_offset() + begin)

usual, count = extension.empty_map, 0
def guarded_map(x, channels, rows, columns, dtype):
    made = usual(x, channels, rows, columns, dtype)
    return place(second, made.shape, made.stride(), end) if dtype is torch.float32 else made
pool.empty_map = chain_module.empty_map = guarded_map

layouts = (torch.contiguous_format, torch.channels_last)
shapes = [(1, 3, 5, 6), (2, 16, 9, 17), (1, 20, 7, 33), (2, 18, 12, 5), (1, 2, 70, 16)]
windows = [(3, 2, 0, 3, 0), (5, 2, 1, 3, 0), (5, 2, 1, 5, 1), (3, 2, 1, 3, 1), (3, 1, 1, 3, 1), (5, 1, 2, 3, 1)]
windows.append((3, 2, 0, 0, 0))
with torch.inference_mode():
    for shape, layout, end in itertools.product(shapes, layouts, (False, True)):
        like = torch.randn(shape).contiguous(memory_format=layout)
        x = place(first, shape, like.stride(), end).copy_(like)
        channels = shape[1]
        for kernel, stride, padding, window, around in windows:
            weight = torch.randn(channels, 1, kernel, kernel)
            for merge, outputs, ahead in itertools.product(("sum", "cat"), (0, 5, channels), ("", "relu")):
                merge = merge if window else ""
                matrix = torch.randn(outputs, channels * (2 if merge == "cat" else 1), 1, 1) if outputs else None
                residual = "maxima" if merge == "cat" and outputs == channels else ""
                told = (x, ahead, weight, None, stride, padding, None, None, "relu", window, around, merge)
                told = (*told, matrix, None, "", residual)
                expected = kernels.chain_meaning(*told)
                found = kernels.chain(*told)
                if extension.native.POINTWISE or not outputs:  # else the last step is torch's
                    assert second.data_ptr() <= found.data_ptr() < second.data_ptr() + 4 * second.numel()
                scale = float(expected.abs().max())
                torch.testing.assert_close(found.clone(), expected, rtol=0, atol=1e-5 * max(scale, 1.0))
                count += 1
        for window in ((3, 2, 0), (3, 1, 1), (3, 2, 1), (5, 2, 1), (5, 1, 2)):
            expected, taps = pool.taps_meaning(x, *window)
            assert torch.equal(pool.VALUES(x, *window), expected)
            found = pool.TAPS(x, *window)
            assert torch.equal(found[0], expected) and torch.equal(found[1], taps)
            x_again = x.clone(memory_format=torch.preserve_format)
            settings = (*shape[2:], not x.is_contiguous(), *window)
            back = pool.backward_meaning(expected, taps, *settings)
            planes, unit = (shape[0], channels) if settings[2] else (shape[0] * channels, 1)
            grad, taps = (t.contiguous(memory_format=layout) for t in (expected, taps))
            extension.native.max_pool_backward(
                grad.data_ptr(), taps.data_ptr(), x.data_ptr(), planes, *shape[2:], unit, *window, 1
            )
            assert torch.equal(x, back)
            x.copy_(x_again)
            count += 1
print(count)
"""
    assert run_alone(script) == 5 * 2 * 2 * (7 * 12 + 5)
