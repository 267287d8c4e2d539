"""The block tracer: one module's own forward as a small torch.fx graph, checked against the original.

Every child is a leaf, so hooks on children keep firing and their classes keep their meaning. The trace
runs on a stand-in under a spy class that notes which plain state the forward reads (baked into the
graph, so it becomes *locked*) and whether it writes any (then the block is refused). The unedited graph
must then issue, in eval and in train mode, exactly the operations, arguments and dataflow that the
original forward issues: equal streams mean equal values, gradients and buffers.
"""

from __future__ import annotations

import enum
import inspect
import operator
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

from padfree.errors import Refusal
from padfree.indices import OpId, ValueId
from padfree.record.recording import Call, Recording
from padfree.record.trees import first_line
from padfree.rewrite.asserts import asserted
from padfree.rewrite.forward import is_rewritten
from padfree.rewrite.hints import parameter_types, without_none
from padfree.rewrite.modes import Flags, Setting, align, asked_flags, setting, settings_of
from padfree.rewrite.reads import carried, watched
from padfree.rewrite.selfcheck import bind, holds_tensor, link
from padfree.rewrite.spy import OPAQUE, Locked, Spy
from padfree.rewrite.unseen import TRIES, Draws, noting_unseen, random_states


@dataclass(frozen=True)
class Body:
    """What a forward does in one setting of the modes that it asks, tied to the recording.

    Attributes:
        graph: the forward, children as leaves.
        nodes: graph nodes by recorded value, in order. anchors: graph node by recorded operation.
    """

    graph: fx.Graph
    nodes: dict[ValueId, list[fx.Node]]
    anchors: dict[OpId, fx.Node]

    def copied(self) -> Body:
        """The same with a graph of its own, to be edited."""
        graph = fx.Graph()
        table: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(self.graph, table))
        nodes = {value: [table[node] for node in found] for value, found in self.nodes.items()}
        anchors = {op: table[node] for op, node in self.anchors.items() if node in table}
        return Body(graph, nodes, anchors)


@dataclass(frozen=True)
class TracedBlock:
    """A block's forward as graphs, tied to the recording.

    Attributes:
        path: the block's path.
        flags: paths below it of the modules whose `training` chooses the body; "" is the block itself.
        bodies: one for each of `modes.settings_of(flags)`; the first is the recorded one.
        locked: plain state baked into the graphs, with its value where that is simple.
    """

    path: str
    flags: Flags
    bodies: tuple[Body, ...]
    locked: Locked

    def copied(self) -> TracedBlock:
        """The same with graphs of its own, to be edited."""
        return TracedBlock(self.path, self.flags, tuple(body.copied() for body in self.bodies), self.locked)


def trace_block(recording: Recording, call: Call) -> TracedBlock:
    """Trace the forward of the module that `call` calls.

    Raises:
        Refusal: its forward cannot be replaced by a graph, with the reason.
    """
    module = recording.modules[call.path]
    where = f"`{call.path}` ({type(module).__name__})" if call.path else f"the model itself ({type(module).__name__})"
    _check_kind(module, where)
    spy = Spy(module)

    def traced(flags: Setting, others: bool) -> fx.Graph:
        with setting(module, flags, others):
            return _trace(spy, call, flags.get("", others), where)

    flags = asked_flags(module, lambda flags, others: str(traced(flags, others)), where)
    settings = settings_of(flags)
    graphs = [traced(flags, False) for flags in settings]
    if call.path == "" and spy.methods:
        raise Refusal(
            f"the forward of {where} calls its own method `{sorted(spy.methods)[0]}`, which others would run "
            "unconverted; move the layers into a child module"
        )
    for graph in graphs:
        for node in graph.nodes:
            if node.op == "get_attr" and not _resolves(module, str(node.target)):
                raise Refusal(f"the forward of {where} reads a tensor that is neither a parameter nor a buffer")
    bodies: list[Body] = []
    for graph, flags_now in zip(graphs, settings, strict=True):
        nodes, anchors = link(recording, call, graph, where, flags_now)
        if bodies:
            pairs = align(bodies[0].graph, graph)
            nodes = {value: [pairs[n] for n in found if n in pairs] for value, found in bodies[0].nodes.items()}
            anchors = {op: pairs[node] for op, node in bodies[0].anchors.items() if node in pairs}
        bodies.append(Body(graph, nodes, anchors))
    read_live = {str(node.target) for graph in graphs for node in graph.nodes if node.op == "get_attr"}
    called = {str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_module"}
    locked = carried(module, read_live) | {name: value for name, value in spy.locked() if name not in read_live}
    locked |= dict.fromkeys(sorted(spy.methods), OPAQUE)  # an instance may be given its own
    locked |= watched(module, spy, called, read_live)
    return TracedBlock(call.path, flags, tuple(bodies), tuple(locked.items()))


def _check_kind(module: nn.Module, where: str) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise Refusal(f"{where} is TorchScript; convert the Python model, then script it")
    if isinstance(module, fx.GraphModule):
        raise Refusal(f"{where} is a torch.fx GraphModule; convert the model first, then trace it")
    if "forward" in module.__dict__:
        raise Refusal(f"{where} has a forward of its own on the instance, which an edited class cannot replace")


class BlockTracer(fx.Tracer):
    """Traces one forward with every child a leaf; flags among its arguments are bound to recorded values."""

    def __init__(self, autowrap_functions: tuple[Callable[..., Any], ...] = ()) -> None:
        super().__init__(autowrap_functions=autowrap_functions)
        self.proxy_buffer_attributes = True
        self.arguments: dict[str, Any] = {}
        self._thread = threading.get_ident()

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A node for a child; models that other threads run meanwhile go on (torch.fx patches the call for all)."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A node for a parameter or buffer, in the thread that traces."""
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """What an `assert` wants `obj` to be: it stays asked, as `torch._assert`."""
        frame = inspect.currentframe()
        caller = frame and frame.f_back and frame.f_back.f_back  # of the proxy's own `__bool__`
        wants = asserted(caller) if caller else None
        if wants is None:
            return super().to_bool(obj)
        condition = obj if wants[0] else self.create_proxy("call_function", operator.not_, (obj,), {})
        self.create_proxy("call_function", torch._assert, (condition, wants[1]), {})
        return wants[0]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Every child is a leaf."""
        return True

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """A placeholder for each parameter of the forward.

        Flags (None, bool, str) pass their recorded value, lists of tensors a list of their elements.
        """
        args: list[Any] = [self.root]
        by_name: list[str] = []  # of keyword-only parameters
        optional = False
        lists: list[tuple[Any, list[Any]]] = []  # what stands for a list of tensors, with its stand-in
        for parameter in list(inspect.signature(root_fn).parameters.values())[1:]:
            value = self.arguments[parameter.name]
            default = () if parameter.default is parameter.empty else (parameter.default,)
            if default == (None,) and holds_tensor((value,)) and not optional:
                default = ()  # a tensor of TorchScript's has no default
            optional = optional or bool(default)
            proxy: Any = self.create_proxy("placeholder", parameter.name, default, {})
            if parameter.kind is parameter.KEYWORD_ONLY:
                by_name.append(parameter.name)
            if isinstance(value, enum.Enum):
                raise TypeError(f"it takes the enum member {value!r}, which a generated forward cannot compare with")
            if value is None or isinstance(value, (bool, str)):
                self.create_proxy("call_function", expect_argument, (proxy, value, parameter.name), {})
                args.append(value)
            elif isinstance(value, (list, tuple)) and holds_tensor(value):
                self.create_proxy("call_function", expect_length, (proxy, len(value), parameter.name), {})
                args.append(type(value)(proxy[index] for index in range(len(value))))
                if type(value) is list:
                    lists.append((proxy, args[-1]))
            else:
                args.append(proxy)
        split = len(args) - len(by_name)
        before = [list(given) for _, given in lists]

        def forward(*given: Any) -> Any:
            result = root_fn(*given[:split], **dict(zip(by_name, given[split:], strict=True)))
            for (proxy, after), old in zip(lists, before, strict=True):
                if len(after) != len(old) or any(a is not b for a, b in zip(after, old, strict=True)):
                    self.create_proxy("call_function", refill, (proxy, list(after)), {})
                    result = _instead(result, after, proxy)
            return self._ordered(result)

        return forward, args

    def _ordered(self, tree: Any) -> Any:
        """A result whose ordered dictionaries stay what they are: torch.fx would make them plain ones."""
        if type(tree) is OrderedDict:
            pairs = [(key, self._ordered(item)) for key, item in tree.items()]
            return self.create_proxy("call_function", OrderedDict, (pairs,), {})
        return type(tree)(map(self._ordered, tree)) if type(tree) in (list, tuple) else tree


def _instead(tree: Any, old: list[Any], new: Any) -> Any:
    """`tree` with one list in it replaced, wherever that very list stands."""
    if tree is old:
        return new
    if type(tree) in (list, tuple):
        return type(tree)(_instead(item, old, new) for item in tree)
    return {key: _instead(item, old, new) for key, item in tree.items()} if type(tree) is dict else tree


def refill(given: list[torch.Tensor], tensors: list[torch.Tensor]) -> None:
    """Generated code calls this for a list that the original forward changes: its caller sees the change."""
    given.clear()
    given.extend(tensors)


def expect_argument(found: Any, expected: Any, name: str) -> None:
    """Generated code calls this for an argument whose recorded value its graph was traced with."""
    if not (found is expected or found == expected):
        raise RuntimeError(
            f"this converted block was traced with {name}={expected!r} and got {found!r}; "
            "call it so, or move its layers into a child module that is called one way only, and convert again"
        )


def expect_length(found: Any, expected: int, name: str) -> None:
    """Generated code calls this for a list of tensors, whose recorded length its graph was traced with."""
    if len(found) != expected:
        raise RuntimeError(
            f"this converted block was traced with {expected} tensors in {name} and got {len(found)}; "
            "convert the model with a forward that passes as many"
        )


def _trace(spy: Spy, call: Call, training: bool, where: str) -> fx.Graph:
    for _ in range(TRIES):
        chance = random_states()
        graph = _trace_once(spy, call, training, where)
        if random_states() == chance:
            return graph
    raise Refusal(f"the forward of {where} draws random numbers of its own")


def _trace_once(spy: Spy, call: Call, training: bool, where: str) -> fx.Graph:
    failure: Exception | None = None
    # functions that a generated forward calls stay whole: it is flat already
    for helpers in (True,) if is_rewritten(spy.module) else (False, True):
        stand_in = spy.fresh(training)
        tracer = BlockTracer(_helpers(spy.module) if helpers else ())
        tracer.arguments = bind(stand_in, call, where)
        spy.writes.clear()
        try:
            with noting_unseen() as unseen, Draws() as draws:
                graph = tracer.trace(stand_in)
            break
        except Exception as error:
            failure = failure or error
            spy.watch.changed()  # what it got done has to be undone all the same
    else:
        assert failure is not None
        raise Refusal(
            f"the forward of {where} cannot be traced: {type(failure).__name__}: {first_line(failure)}"
        ) from failure
    if unseen:
        raise Refusal(f"the forward of {where} {unseen[0]}, which a generated forward would lose")
    if draws.seen:
        raise Refusal(f"the forward of {where} draws random numbers of its own")
    if writes := sorted(name for name in spy.writes if not name.startswith("_tensor_constant")):
        raise Refusal(f"the forward of {where} writes its own attribute `{writes[0]}`")
    if changed := spy.watch.changed():
        raise Refusal(f"the forward of {where} writes into {changed[0]}")
    hints = parameter_types(spy.module)
    for node in graph.nodes:  # annotations may name what only the block's own file imports
        hint = hints.get(node.target) if node.op == "placeholder" else None
        given = holds_tensor((tracer.arguments.get(node.target),)) and not node.args
        node.type = without_none(hint) if given else hint
        node.args, node.kwargs = map_aggregate(node.args, _plain), map_aggregate(node.kwargs, _plain)
    return graph


def _plain(value: Any) -> Any:
    """A number of numpy's as one of Python's, which generated code can be written with."""
    numpy = sys.modules.get("numpy")
    return value.item() if numpy is not None and isinstance(value, numpy.generic) else value


def _helpers(module: nn.Module) -> tuple[Callable[..., Any], ...]:
    """Functions of its own file that a forward may call; kept whole where tracing into them fails."""
    names = getattr(type(module).forward, "__globals__", {})
    functions = [value for value in names.values() if inspect.isfunction(value)]
    return tuple(function for function in functions if not str(function.__module__).startswith("torch."))


def _resolves(module: nn.Module, path: str) -> bool:
    try:
        for name in path.split("."):
            module = getattr(module, name)
    except AttributeError:
        return False
    return True
