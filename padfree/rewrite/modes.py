"""The mode a forward runs in: which `training` flags it asks, and what its bodies for them have in common.

A forward that asks `self.training`, or the flag of a child (`F.dropout(x, self.drop.p, self.drop.training)`), is
traced once for each combination of these flags. Edits are made in all bodies alike, so their nodes are aligned.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

from padfree.errors import Refusal
from padfree.record.copies import in_mode

MOST_FLAGS = 3  # bodies double with each

Flags = tuple[str, ...]
Setting = dict[str, bool]


@contextmanager
def setting(module: nn.Module, flags: Mapping[str, bool], others: bool) -> Iterator[None]:
    """Modules below and including `module` in the modes that `flags` says by path, and in `others` elsewhere."""
    with in_mode(module.modules(), others):
        for path, training in flags.items():
            module.get_submodule(path).training = training
        yield


def settings_of(flags: Flags) -> list[Setting]:
    """Every combination, all in eval mode first; the last flag changes fastest."""
    return [dict(zip(flags, values, strict=True)) for values in itertools.product((False, True), repeat=len(flags))]


def asked_flags(module: nn.Module, trace: Callable[[Setting, bool], str], where: str) -> Flags:
    """Paths of the modules whose mode changes what a forward does ("" is the module itself).

    Args:
        module: whose forward it is.
        trace: text of the trace under flags by path, all others in the mode given.
        where: the module, in words.

    Raises:
        Refusal: more than `MOST_FLAGS`, or a combination that single flags do not explain.
    """
    evaluated, trained = trace({}, False), trace({}, True)
    if evaluated == trained:
        return ()
    own = {"": True}
    if trace(own, False) == trained and trace({"": False}, True) == evaluated:
        return ("",)
    paths = [path for path, child in module.named_modules() if not path or not isinstance(child, nn.ModuleList)]
    found = tuple(
        path for path in paths if trace({path: True}, False) != evaluated or trace({path: False}, True) != trained
    )
    explained = bool(found) and len(found) <= MOST_FLAGS
    for flags in settings_of(found) if explained else ():
        explained = explained and trace(flags, False) == trace(flags, True)
    if not explained:
        raise Refusal(
            f"the forward of {where} runs other code in training than in eval mode, by the modes of "
            f"{len(found) or 'several'} modules; let it ask at most {MOST_FLAGS}"
        )
    return found


def align(first: fx.Graph, other: fx.Graph) -> dict[fx.Node, fx.Node]:
    """For nodes of one body, those of another that do the same on what was made the same way.

    Two nodes belong together if they call the same thing in the same order, and are made of nodes that belong
    together, where operations of one body only (a dropout, an auxiliary head) are looked through.
    """
    ours, theirs = list(first.nodes), list(other.nodes)
    matcher = difflib.SequenceMatcher(None, list(map(_key, ours)), list(map(_key, theirs)), autojunk=False)
    pairs: dict[fx.Node, fx.Node] = {}
    for block in matcher.get_matching_blocks():
        for step in range(block.size):
            pairs[ours[block.a + step]] = theirs[block.b + step]
    known, back = set(pairs), {b: a for a, b in pairs.items()}
    made_of_ours, made_of_theirs = _origins(ours, known), _origins(theirs, set(back))
    return {a: b for a, b in pairs.items() if made_of_ours[a] == {back[node] for node in made_of_theirs[b]}}


def _key(node: fx.Node) -> tuple[str, Any]:
    return (node.op, node.target if isinstance(node.target, str) else id(node.target))


def _origins(nodes: list[fx.Node], known: set[fx.Node]) -> dict[fx.Node, set[fx.Node]]:
    """The known nodes each node is made of, where the unknown ones between are looked through."""
    found: dict[fx.Node, set[fx.Node]] = {}
    for node in nodes:
        found[node] = set().union(*({one} if one in known else found[one] for one in node.all_input_nodes))
    return found
