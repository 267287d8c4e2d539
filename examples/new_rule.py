"""Write a new rule: 3x3 stride-2 max-pools lose their padding too, wherever they stand.

The built-in rules leave a max-pool that no strided conv stands beside as it is. This rule gives every such pool
its padding-free form. A rule finds places in a recording (`match`) and edits them by name (`rewrite`); planning,
grouping by map, verification, pickling and the command line's `--rules` come with it.

python examples/new_rule.py
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

import padfree
from padfree.analysis.kinds import MAX_POOLS, data_input
from padfree.analysis.sites import Sites
from padfree.geometry import padfree_size
from padfree.rules.base import Editor, Rule, register
from padfree.types import Match, Options, Skip


def match(sites: Sites, options: Options) -> Iterator[Match | Skip]:
    """Max-pool modules with a 3x3 window, stride 2 and padding 1."""
    flow, recording = sites.flow, sites.recording
    for op in flow.ops:
        if op.kind not in MAX_POOLS:
            continue
        path = recording.calls[op.call].path
        pool = recording.modules[path]
        if not isinstance(pool, nn.MaxPool2d) or (pool.kernel_size, pool.stride, pool.padding) != (3, 2, 1):
            yield Skip(path, "not a 3x3 max-pool of stride 2 and padding 1", "maxpool", in_scope=False)
            continue
        source, out = data_input(op), op.outputs[0]
        height, width = flow.size(source)
        yield Match(
            rule="maxpool",
            name=path,
            block="",
            domain=flow.domain(out),
            size=(height, width),
            out_before=flow.size(out),
            out_after=(padfree_size(height), padfree_size(width)),
            detail={"op": op.index},
        )


def rewrite(found: Match, edit: Editor) -> None:
    """Turn the pool into 3x3, stride 2, no padding."""
    edit.pool(found.detail["op"])


def main() -> None:
    """Convert a small network with the new rule and show what it did."""
    register(Rule("maxpool", match, rewrite, default=False))
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        nn.Sequential(nn.MaxPool2d(3, 2, padding=1), nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
    )
    converted = padfree.convert(model, rules=["maxpool"], input_size=(3, 32, 32))
    print(converted.padfree_plan)
    print(f"{converted[1][0]}: {tuple(converted[1][0](torch.zeros(1, 16, 32, 32)).shape)}")


if __name__ == "__main__":
    main()
