"""The integers that number the parts of a recording, each a type of its own so that none is taken for another."""

from __future__ import annotations

from typing import NewType

ValueId = NewType("ValueId", int)  # a tensor as it flows: its place in `Recording.values`
OpId = NewType("OpId", int)  # an ATen operation: its place in `Recording.ops`; -1 for none
CallId = NewType("CallId", int)  # a module call: its place in `Recording.calls`; -1 for none
DomainId = NewType("DomainId", int)  # maps that share a size: the smallest of their values; -1 for none
