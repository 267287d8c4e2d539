"""Puts chains and merged branches in their places: one new layer for the operations of each.

The block whose own forward holds the core of what is found is traced, and its graph loses those nodes. Parts
that lie in neighbouring containers (torchvision keeps the activation ahead and the 1x1 convolution behind there) become
an `nn.Identity` in their place, which passes on what the chain reads or makes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from padfree.deploy.branches import Branches, merged
from padfree.deploy.chains import StridedChain
from padfree.deploy.operations import Operations
from padfree.deploy.passing import passes_on, without_identities
from padfree.deploy.readers import Parameters, hooked
from padfree.errors import Refusal
from padfree.indices import OpId, ValueId
from padfree.layers.fused import SETTINGS, FusedChain
from padfree.record.recording import Call, Recording
from padfree.rewrite.edit import BlockEdit, Places
from padfree.rewrite.effects import methods_naming
from padfree.rewrite.forward import graph_source, original_class, rewritten_class, sealing_class, set_class
from padfree.rewrite.keeping import common, keep_empty
from padfree.rewrite.kept import MERGED
from padfree.rewrite.reads import without_reads
from padfree.rewrite.refusing import refused_methods, refusing_class
from padfree.rewrite.sealed import FUSERS
from padfree.rewrite.tracer import TracedBlock, trace_block
from padfree.rewrite.views import SEALED

Found = StridedChain | Branches


class Carrier:
    """Puts what was found in one recording in place.

    Args:
        model: in eval mode; its parameters, buffers and children change.
        recording: of this very model.
    """

    def __init__(self, model: nn.Module, recording: Recording) -> None:
        self._model = model
        self._recording = recording
        self._look = Operations(recording)
        self._parameters = Parameters(model, recording)
        self._idle = self._parameters.idle()
        self._modules = dict(model.named_modules())
        self._traced: dict[str, TracedBlock | Refusal] = {}
        self._gone: list[str] = []  # paths of modules that chains took the place of
        self._merged_within: dict[str, str] = {}  # modules that are parts of one now, and what holds them all
        self._edits: dict[str, BlockEdit] = {}
        self._taken: set[int] = set()
        self._changed: set[str] = set()

    def carry(self, found: Iterable[list[Any]]) -> bool:
        """Put each of these in place, in the first of its forms in which it can be.

        Args:
            found: `StridedChain`s or `Branches`, in the forms that they may take.

        Returns:
            whether something was.
        """
        for forms in found:
            for form in forms:
                try:
                    self._place(form)
                except Refusal:
                    continue
                self._taken.update(form.ops)
                break
        for path, within in self._merged_within.items():
            keep_empty(self._model, path, MERGED, within)
        for path in sorted(self._changed):
            self._finish(path, self._edits[path])
        return bool(self._changed)

    def _place(self, chain: Found) -> None:
        """Put one form of a chain in place.

        Raises:
            Refusal: it cannot be; nothing was changed.
        """
        if not self._taken.isdisjoint(chain.ops):
            raise Refusal("another chain has a part of it")
        block = self._around(chain.core)
        inside = self._inside(chain, block)
        self._check_alone(chain, inside)
        gone = self._vanishing(inside)
        layer = self._chain(chain, gone) if isinstance(chain, StridedChain) else self._merged(chain, gone)
        outer = self._outer(chain, block)
        edit = self._edit(block)
        if any(_under(node, gone, block.path) and node.users for node in edit.traced.bodies[0].graph.nodes):
            raise Refusal("the forward asks for a weight of its own accord")
        _cut(edit, {op for op in chain.ops if op not in outer}, layer, self._modules, block.path)
        self._changed.add(block.path)
        for path in gone:
            parent, _, name = path.rpartition(".")
            # past __setattr__: a generated forward may have locked some of its block's attributes
            self._modules[parent]._modules[name] = nn.Identity().eval()
        whole = common(block.path if outer else f"{block.path}.chain".strip("."), *gone)
        self._merged_within.update(dict.fromkeys((*gone, *((block.path,) if outer else ())), whole))
        self._gone += gone

    # -- may it go ------------------------------------------------------------------------------

    def _inside(self, chain: Found, block: Call) -> list[Call]:
        """Calls that run nothing but operations of the chain, the block's own and those around it left out."""
        ops, around = self._idle.union(chain.ops), {call.index for call in self._recording.ancestors(block.index)}
        calls = self._recording.calls
        busy = (call for call in calls if not self._idle.issuperset(call.ops))
        return [call for call in busy if ops.issuperset(call.ops) and call.index not in around]

    def _check_alone(self, chain: Found, inside: list[Call]) -> None:
        """Refuse a chain whose inner values something else reads, or a hook sees."""
        recording, ops = self._recording, set(chain.ops)
        made = {value for op in chain.ops for value in recording.ops[op].outputs} - {chain.out}
        for value in made:
            if value in recording.outputs or not ops.issuperset(recording.consumers.get(value, [])):
                raise Refusal("something else reads what it makes on the way")
        seeing = [call for call in recording.calls if not made.isdisjoint((*call.inputs, *call.outputs))]
        for call in (*inside, *seeing):
            module = self._modules.get(call.path)
            if module is None or hooked(module) or not (self._once(call) or _stateless(module)):
                raise Refusal(f"`{call.path}` carries hooks, or runs more than once")

    def _once(self, call: Call) -> bool:
        return len(self._recording.calls_of[call.path]) == 1

    def _vanishing(self, inside: list[Call]) -> list[str]:
        """Paths of the modules that the chain takes the place of."""
        parents = {call.parent for call in inside}
        paths = []
        for call in inside:
            module = self._modules[call.path]
            owns = any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
            if self._once(call) and (owns or call.index not in parents):  # else it has more to do
                paths.append(call.path)
        return [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]

    def _chain(self, chain: StridedChain, gone: list[str]) -> FusedChain:
        """The layer, with copies of the weights; these must belong to modules that vanish, and to nothing else."""
        weight, bias = self._conv_tensors(chain.conv, gone)
        tensors = {"weight": weight, "bias": bias}
        if chain.point >= 0:
            tensors["point_weight"], tensors["point_bias"] = self._conv_tensors(chain.point, gone)
        if chain.norm >= 0:
            scale, shift = self._norm_tensors(chain.norm, gone)
            tensors |= {"scale": scale.to(weight.dtype), "shift": shift.to(weight.dtype)}
        return FusedChain(tensors, {name: getattr(chain, name) for name in SETTINGS}).eval()

    def _merged(self, branches: Branches, gone: list[str]) -> nn.Conv2d:
        """The convolution that the branches are together."""
        op, lead = self._recording.ops[branches.lead.conv], branches.lead
        like, _ = self._conv_tensors(lead.conv, gone)

        def tensors(index: OpId) -> tuple[torch.Tensor, torch.Tensor | None]:
            if self._recording.ops[index].kind == "convolution":
                return self._conv_tensors(index, gone)
            return self._norm_tensors(index, gone)

        weight, bias = merged(branches.parts, lead, tensors)
        outputs, inputs, *kernel = weight.shape
        padding = op.args[0][4]
        conv: nn.Conv2d = nn.utils.skip_init(  # type: ignore[no-untyped-call]
            nn.Conv2d, inputs * lead.groups, outputs, tuple(kernel), stride=lead.stride,
            padding=(padding[0], padding[-1]), groups=lead.groups, device=like.device, dtype=like.dtype,
        )  # fmt: skip
        last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
        layout = torch.channels_last if last else torch.contiguous_format
        conv.weight = nn.Parameter(weight.to(like.dtype).contiguous(memory_format=layout), requires_grad=False)
        conv.bias = nn.Parameter(bias.to(like.dtype), requires_grad=False)
        return conv.eval()

    def _conv_tensors(self, op: OpId, gone: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        _, weight, bias = self._recording.ops[op].args[0][:3]
        found = self._own(weight.value, gone)
        return found, None if bias is None else self._own(bias.value, gone)

    def _norm_tensors(self, op: OpId, gone: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and shift of a batch norm, in double precision."""
        found = self._look.norm_tensors(self._recording.ops[op])
        assert found is not None
        read, epsilon = found
        weight, bias, mean, variance = (None if each is None else self._own(each, gone).double() for each in read)
        assert mean is not None and variance is not None
        scale = (variance + epsilon).rsqrt() * (1.0 if weight is None else weight)
        return scale, (0.0 if bias is None else bias) - mean * scale

    def _own(self, value: ValueId, gone: list[str]) -> torch.Tensor:
        """A tensor of a module that vanishes.

        Raises:
            Refusal: it is none, or something else has or reads it as well.
        """
        name = self._recording.values[value].name
        owner = name.rpartition(".")[0]
        if not any(owner == path or owner.startswith(f"{path}.") for path in gone) or not self._parameters.alone(value):
            raise Refusal("its weights are computed, or something else has them as well")
        return self._parameters.tensors[name].detach()

    # -- where it lies --------------------------------------------------------------------------

    def _around(self, ops: tuple[OpId, ...]) -> Call:
        """The innermost call that runs all these operations and is no part of them."""
        for call in self._recording.ancestors(self._recording.ops[ops[0]].call):
            if set(ops).issubset(call.ops) and self._once(call):
                return call
        raise Refusal("no module's forward holds it")

    def _outer(self, chain: Found, block: Call) -> set[OpId]:
        """Operations of the chain that lie in other forwards than the block's own, as modules that do nothing else.

        Raises:
            Refusal: they do more, or belong to another block.
        """
        recording, ops = self._recording, set(chain.ops)
        traced = self._trace(block)
        outer: set[OpId] = set()
        nodes: dict[fx.Node, set[OpId]] = {}
        anchors = traced.bodies[0].anchors
        for op, node in anchors.items():
            nodes.setdefault(node, set()).add(op)
        for op in chain.ops:
            place = anchors.get(op)
            if place is None or not nodes[place] <= ops | self._idle:
                outer.add(op)
        if not outer.isdisjoint(chain.core):
            raise Refusal("the block's own forward does not hold its core as parts of their own")
        if not outer:
            return outer
        around = self._around(chain.ops)
        if not around.path or self._strided(around) > 1:
            raise Refusal("its parts belong to different blocks")
        for op in outer:
            call = recording.calls[recording.ops[op].call]
            reads, makes = recording.ops[op].inputs, recording.ops[op].outputs
            alone = set(call.ops) - self._idle == {op} and self._once(call)
            if not alone or call.inputs != reads or call.outputs != makes[:1]:
                raise Refusal(f"`{call.path}` does more than a part of it")
        return outer

    def _strided(self, call: Call) -> int:
        """Strided depthwise convolutions in a call."""
        ops = (self._recording.ops[index] for index in call.ops)
        return sum(op.kind == "convolution" and op.args[0][8] > 1 and max(op.args[0][3]) > 1 for op in ops)

    def _trace(self, block: Call) -> TracedBlock:
        found = self._traced.get(block.path)
        if found is None:
            try:
                traced = trace_block(self._recording, block)
                found = TracedBlock(block.path, (), traced.bodies[:1], traced.locked)  # what it does in eval mode
                graph_source([found.bodies[0].graph])  # which may not be possible
            except Refusal as refusal:
                found = refusal
            self._traced[block.path] = found
        if isinstance(found, Refusal):
            raise found
        return found

    def _edit(self, block: Call) -> BlockEdit:
        edit = self._edits.get(block.path)
        if edit is None:
            edit = self._edits[block.path] = BlockEdit(self._trace(block).copied(), self._modules[block.path]._modules)
        return edit

    def _finish(self, path: str, edit: BlockEdit) -> None:
        """Give a block the forward of its edited graph."""
        module, graph = self._modules[path], edit.traced.bodies[0].graph
        without_identities(graph, module)
        below = f"{path}." if path else ""
        gone = [inner.removeprefix(below) for inner in self._gone if inner.startswith(below)]
        recipe = getattr(type(module), "_padfree_recipe", None)
        locked = (dict(recipe[2]) if recipe else {}) | dict(edit.traced.locked)
        locked = without_reads(locked, gone)
        ends = self._ends(path, gone)
        locked[SEALED] = tuple(sorted({*locked.get(SEALED, ()), *(end for end in ends if "." not in end)}))
        source, names = graph_source([graph])
        base = original_class(module)
        kind = rewritten_class(base, source, names, tuple(sorted(locked.items())))
        named = methods_naming(base, sorted({end.partition(".")[0] for end in ends}))
        merged = {
            name: f"it calls `{end}`, which is merged with others now" for name, end in named if name not in FUSERS
        }
        refused = {**merged, **dict(refused_methods(type(module)))}
        set_class(module, refusing_class(kind, tuple(refused.items())) if refused else kind)
        for holder, _, name in (end.rpartition(".") for end in ends):
            if holder:  # a container that the forward takes apart
                container = self._modules[f"{below}{holder}"]
                set_class(container, sealing_class(container, (name,)))

    def _ends(self, path: str, gone: list[str]) -> set[str]:
        """The children that a block called before they were merged: one after another they give the same no more."""
        traced = self._traced[path]
        assert isinstance(traced, TracedBlock)
        called = {str(node.target) for node in traced.bodies[0].graph.nodes if node.op == "call_module"}
        return {next((t for t in called if f"{inner}.".startswith(f"{t}.")), inner.partition(".")[0]) for inner in gone}


def _cut(edit: BlockEdit, ops: set[OpId], layer: nn.Module, modules: dict[str, nn.Module], path: str) -> None:
    """Let a call of `layer`, a new child, take the place of the nodes that run these operations.

    Raises:
        Refusal: something else in the forward depends on one of them; the graph is as it was.
    """
    graph, anchors = edit.traced.bodies[0].graph, edit.traced.bodies[0].anchors
    order = {node: index for index, node in enumerate(graph.nodes)}
    nodes = sorted({anchors[op] for op in ops}, key=order.__getitem__)
    first, last = nodes[0], anchors[max(ops)]
    inner = set(nodes) - {last}
    for node in order:  # an identity between two parts
        if passes_on(node, path, modules) and not inner.isdisjoint(node.all_input_nodes):
            inner.add(node)
    if any(user not in inner and user is not last for node in inner for user in node.users):
        raise Refusal("something else in the forward depends on what it makes on the way")
    reads = [node for node in first.all_input_nodes if node.op != "get_attr"]
    if len(reads) != 1 or last is not nodes[-1]:
        raise Refusal("it reads more than one map")
    name = edit.reserve("chain" if isinstance(layer, FusedChain) else "conv")
    modules[path]._modules[name] = layer
    new = edit.call_child(Places([first]), name, Places(reads))
    edit.substitute(Places([last]), lambda old, at: new)
    for node in sorted({*inner, last}, key=order.__getitem__, reverse=True):
        graph.erase_node(node)


def _under(node: fx.Node, paths: list[str], block: str) -> bool:
    """Whether a node reads a tensor of a module at one of these paths."""
    target = f"{block}.{node.target}" if block else str(node.target)
    return node.op == "get_attr" and any(target.startswith(f"{path}.") for path in paths)


def _stateless(module: nn.Module) -> bool:
    return not any(True for _ in (*module.parameters(), *module.buffers()))
