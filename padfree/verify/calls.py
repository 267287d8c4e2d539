"""Whether a converted copy calls the same modules and runs the same functional layers, in the same order.

A smaller map decides `if x.shape[-1] >= 8`, `% 2`, `while x.shape[-1] > 4` or `layers[x.shape[-1]]` otherwise than
before: layers fall out of the network, and every shape still fits. So the body of each call (the modules that its own
forward calls and the operations that it issues itself) is compared with what it was.

Left out of the comparison:

1. what the conversion adds, moves and replaces, by path; a forward that it generated was traced without any decision
   on a size, and may only have lost pads and pools, and won shortcuts;
2. operations that may depend on a map's size without meaning anything else: views and constants; pads, crops,
   interpolations and indexing are looked at by `padfree.verify.resizing` and `padfree.verify.places`;
3. operations of torch's own leaves: a recurrent layer runs once for each pixel of a row;
4. what follows a value that was looked at (`.item()`, `nonzero`), on recordings of real tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from padfree.analysis.kinds import AVG_POOLS, COUNTING, MAX_POOLS, PRODUCTS, VIEWS, plain_kind
from padfree.errors import Refusal
from padfree.record.recording import Recording
from padfree.rewrite.forward import original_class
from padfree.rewrite.operations import AddChild, MoveChild, Operation, Reforward, ReplaceEnd, Substitute
from padfree.verify.resizing import CUTS, PADS, RESAMPLING

_DECIDING = COUNTING | {"_local_scalar_dense", "is_nonzero", "equal"}
_LAYOUT = VIEWS | PADS | CUTS | {"split", "split_with_sizes", "unfold", "copy", "_pad_circular"}
_WON = frozenset({"add", "max_pool2d_with_indices", "max_pool2d", "avg_pool2d", "cat", "index_select"})
_LOST = MAX_POOLS | AVG_POOLS
_MODULE = "module "  # what an event that is a call begins with


@dataclass(frozen=True)
class Changed:
    """Module paths that the operations of a conversion change.

    Attributes:
        rewritten: whose forward was generated. added: new children. replaced: with all below them, no longer there.
        substituted: those of the replaced ones whose work the module at their place does.
    """

    rewritten: frozenset[str]
    added: frozenset[str]
    replaced: frozenset[str]
    substituted: frozenset[str] = frozenset()

    @classmethod
    def by(cls, operations: Iterable[Operation]) -> Changed:
        """What these operations change."""
        rewritten, added, replaced, substituted = set(), set(), set(), set()
        for op in operations:
            if isinstance(op, Reforward) and op.source:
                rewritten.add(op.path)
            elif isinstance(op, (AddChild, MoveChild)):
                added.add(f"{op.path}.{op.name}" if op.path else op.name)
            if isinstance(op, MoveChild):
                replaced.add(op.origin)
            elif isinstance(op, (ReplaceEnd, Substitute)):
                replaced.add(op.path)
            if isinstance(op, Substitute):
                substituted.add(op.path)
        return cls(frozenset(rewritten), frozenset(added), frozenset(replaced), frozenset(substituted))

    def is_new(self, path: str) -> bool:
        """Whether a module is one that was added, or lies in one."""
        return _within(path, self.added)

    def place(self, path: str) -> str:
        """The path of the module that did before what the module at `path` does now."""
        return next((root for root in self.substituted if path.startswith(f"{root}.")), path)

    def is_gone(self, path: str) -> bool:
        """Whether a module gave its place to another."""
        return _within(path, self.replaced)


def _within(path: str, roots: frozenset[str]) -> bool:
    return path in roots or any(path.startswith(f"{root}.") for root in roots)


def check_calls(before: Recording, after: Recording, changed: Changed) -> None:
    """Compare the bodies of all calls.

    Args:
        before: the model as it was.
        after: the converted copy, recorded in the same mode.
        changed: what the conversion changed on purpose.

    Raises:
        Refusal: a module or operation runs more or less often, or in another order.
    """
    leaves = {path for path, module in before.modules.items() if _torchs_own(module)}
    were, are = _bodies(before, leaves), _bodies(after, leaves)
    for path, bodies in were.items():
        if changed.is_gone(path):
            continue
        now = [_plain(body, changed) for body in are.get(path, ())]
        for old, new in zip(bodies, now, strict=False):  # how often a module is called is its caller's matter
            if old != new:
                if path in changed.rewritten:
                    _check_rewritten(before, path, old, new)
                else:
                    raise Refusal(_difference(path, old, new))


def _check_rewritten(before: Recording, path: str, old: list[str], new: list[str]) -> None:
    """A generated forward loses pads and pools and wins shortcuts, nothing else."""
    lost, won = Counter(old) - Counter(new), Counter(new) - Counter(old)
    for event in lost:
        inner = before.modules.get(event.removeprefix(_MODULE)) if event.startswith(_MODULE) else None
        bare = inner is not None and not list(inner.parameters())
        if not bare and event not in _LOST:
            raise Refusal(_difference(path, old, new))
    if not _WON.issuperset(won):
        raise Refusal(_difference(path, old, new))


def _plain(body: list[str], changed: Changed) -> list[str]:
    return [event for event in body if not changed.is_new(event.removeprefix(_MODULE))]


def _bodies(recording: Recording, leaves: set[str]) -> dict[str, list[list[str]]]:
    """By module path, what each of its calls did itself: modules called and kinds of operations, in order.

    Operations of `leaves` are left out.
    """
    end = _decided(recording)
    events: dict[int, list[tuple[int, int, str]]] = {-1: []}
    for call in recording.calls:
        if call.ops.start < end:
            events[call.index] = []
            events[call.parent].append((call.ops.start, call.index, f"{_MODULE}{call.path}"))
    for op in recording.ops[:end]:
        kind = "product" if op.kind in PRODUCTS else plain_kind(op)
        compared = op.inputs and kind not in _LAYOUT and not kind.startswith(RESAMPLING)
        if compared and (op.call < 0 or recording.calls[op.call].path not in leaves):
            events[op.call].append((op.index, len(recording.calls), kind))
    found: dict[str, list[list[str]]] = {}
    for index, inside in events.items():
        path = recording.calls[index].path if index >= 0 else None
        if path is not None:
            found.setdefault(path, []).append([event for _, _, event in sorted(inside)])
    return found


def _torchs_own(module: nn.Module) -> bool:
    """Whether a module is a leaf of torch's; what a container of torch's runs may be a scripted child's."""
    return original_class(module).__module__.startswith("torch.") and not module._modules


def _decided(recording: Recording) -> int:
    """The first operation after which the values of real tensors decide what runs."""
    if recording.meta:
        return len(recording.ops) + 1
    deciding = (op.index for op in recording.ops if op.kind in _DECIDING and op.inputs)
    return next(deciding, len(recording.ops) + 1)


def _difference(path: str, old: list[str], new: list[str]) -> str:
    """In words: modules before operations, numbers before order."""
    where = f"the forward of `{path}`" if path else "the model's own forward"
    counts = Counter(old), Counter(new)
    differing = [event for event in dict.fromkeys((*old, *new)) if counts[0][event] != counts[1][event]]
    differing.sort(key=lambda event: not event.startswith(_MODULE))
    if differing:
        event = differing[0]
        name = f"`{event.removeprefix(_MODULE)}`" if event.startswith(_MODULE) else event
        did = "call" if event.startswith(_MODULE) else "run"
        return (
            f"{where} decides by a map's size what it runs: it would {did} {name} {_times(counts[1][event])} "
            f"instead of {_times(counts[0][event])}"
        )
    was, now = next((a, b) for a, b in zip(old, new, strict=True) if a != b)
    words = [f"`{event.removeprefix(_MODULE)}`" if event.startswith(_MODULE) else event for event in (now, was)]
    return (
        f"{where} decides by a map's size in which order it runs what: {words[0]} would run in the place of {words[1]}"
    )


def _times(count: int) -> str:
    return f"{count} time{'s' * (count != 1)}"
