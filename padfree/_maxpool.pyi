"""The C extension, built where a compiler is at hand; addresses of memory, then sizes. Called by `padfree.native`."""

from typing import Any

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
def onepass(
    table: object,
    kinds: tuple[type, ...],
    watch: tuple[object, ...],
    map: object,
    modules: tuple[object, ...],
    stride: int,
    pool: int,
    pool_padding: int,
    merge: int,
    joined: bool,
    leads: bool,
    mixed: bool,
    extra: int,
    threads: int,
) -> Any: ...
