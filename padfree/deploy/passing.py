"""Calls of a graph that only pass on what they are given, in eval mode: a fused network has none of them."""

from __future__ import annotations

from torch import fx, nn

from padfree.deploy.readers import hooked
from padfree.rewrite.forward import acting_class

_PASSING = (nn.Identity, nn.Dropout, nn.Dropout2d)  # in eval mode


def passes_on(node: fx.Node, path: str, modules: dict[str, nn.Module]) -> bool:
    """Whether a node only passes on what it is given, unseen: an identity without hooks."""
    if node.op != "call_module":
        return False
    child = modules.get(f"{path}.{node.target}" if path else str(node.target))
    return child is not None and acting_class(child) in _PASSING and not hooked(child)


def without_identities(graph: fx.Graph, module: nn.Module) -> None:
    """Drop calls that only pass on what they are given, in eval mode, and tensors that nothing uses."""
    modules = dict(module.named_modules())
    for node in list(graph.nodes):
        if passes_on(node, "", modules) and len(node.args) == 1 and isinstance(node.args[0], fx.Node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.op == "get_attr" and not node.users:
            graph.erase_node(node)
