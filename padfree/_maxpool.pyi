"""The C extension `_maxpool.c`, built where a compiler is at hand; `padfree.pooling` does without it elsewhere."""

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
