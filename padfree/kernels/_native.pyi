"""The C extension, built where a compiler is at hand: addresses of memory, then sizes. See `csrc/module.c`."""

POINTWISE: int  # whether `chain` has 1x1 convolutions: the compiler has vectors

def max_pool(
    source: int,
    target: int,
    planes: int,
    height: int,
    width: int,
    unit: int,
    kernel: int,
    stride: int,
    padding: int,
    threads: int,
) -> None: ...
def max_pool_taps(
    source: int,
    target: int,
    taps: int,
    planes: int,
    height: int,
    width: int,
    unit: int,
    kernel: int,
    stride: int,
    padding: int,
    threads: int,
) -> None: ...
def max_pool_backward(
    grad: int,
    taps: int,
    target: int,
    planes: int,
    height: int,
    width: int,
    unit: int,
    kernel: int,
    stride: int,
    padding: int,
    threads: int,
) -> None: ...
def chain(
    source: int,
    target: int,
    map: tuple[int, int, int, int, int],  # channels_last, N, C, H, W
    ahead: tuple[int, float, float],  # an activation's code, or -1, and its settings
    conv: tuple[int, int, int, int, int, int, int],  # weight, bias, scale, shift (0: none); kernel, stride, padding
    act: tuple[int, float, float],
    pool: tuple[int, int, int],  # kernel (0: none), padding, where the maxima go
    point: tuple[int, int, int, int, float, float],  # weight, bias, outputs (0: none), activation
    residual: int,
    threads: int,
) -> bool: ...
