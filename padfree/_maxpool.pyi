"""The C extension, built where a compiler is at hand; addresses of memory, then sizes. Called by `padfree.native`."""

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
def depthwise(
    tensors: tuple[int, ...],
    targets: tuple[int, int],
    sizes: tuple[int, int, int, int, int],
    windows: tuple[int, int, int, int, int],
    channels_last: bool,
    merge: int,
    limits: tuple[float, float, float],
    threads: int,
) -> bool: ...
