"""The block tracer: one module's own forward as a small torch.fx graph, checked against the original.

Every child is a leaf, so hooks on children keep firing and their classes keep their meaning. The trace
runs on a stand-in under a spy class that notes which plain state the forward reads (baked into the
graph, so it becomes *locked*) and whether it writes any (then the block is refused). The unedited graph
must then issue, in eval and in train mode, exactly the operations, arguments and dataflow that the
original forward issues: equal streams mean equal values, gradients and buffers.
"""

from __future__ import annotations

import inspect
import operator
import random
import sys
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from padfree.errors import Refusal
from padfree.record import Call, Op, Recorder, Recording, Value, _collect, _key, _storage, first_line
from padfree.reforward import quiet_subclass

Locked = tuple[tuple[str, Any], ...]
_SIMPLE = (bool, int, float, str, type(None))
_OPAQUE = "<object>"
_ABSENT = "<absent>"
_CONTAINERS = (list, dict, set, OrderedDict, defaultdict, deque)


@dataclass(frozen=True)
class TracedBlock:
    """A block's forward as a graph, tied to the recording.

    Attributes:
        path: the block's path. graph: its own forward, children as leaves.
        nodes: graph node by recorded value. anchors: graph node by recorded operation.
        locked: plain state baked into the graph, with its value where that is simple.
    """

    path: str
    graph: fx.Graph
    nodes: dict[int, fx.Node]
    anchors: dict[int, fx.Node]
    locked: Locked

    def copied(self) -> TracedBlock:
        """The same with a graph of its own, to be edited."""
        graph = fx.Graph()
        table: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(self.graph, table))
        nodes = {value: table[node] for value, node in self.nodes.items()}
        anchors = {op: table[node] for op, node in self.anchors.items() if node in table}
        return TracedBlock(self.path, graph, nodes, anchors, self.locked)


def trace_block(recording: Recording, call: Call) -> TracedBlock:
    """Trace the forward of the module that `call` calls.

    Raises:
        Refusal: its forward cannot be replaced by a graph, with the reason.
    """
    module = recording.modules[call.path]
    where = f"`{call.path}` ({type(module).__name__})" if call.path else f"the model itself ({type(module).__name__})"
    _check_kind(module, where)
    spy = _Spy(module)
    eval_graph, train_graph = (_trace(spy, call, training, where) for training in (False, True))
    if str(eval_graph) != str(train_graph):
        raise Refusal(f"the forward of {where} runs other code in training than in eval mode")
    if call.path == "" and spy.methods:
        raise Refusal(
            f"the forward of {where} calls its own method `{sorted(spy.methods)[0]}`, which others would run "
            "unconverted; move the layers into a child module"
        )
    for node in eval_graph.nodes:
        if node.op == "get_attr" and not _resolves(module, str(node.target)):
            raise Refusal(f"the forward of {where} reads a tensor that is neither a parameter nor a buffer")
    nodes, anchors = _link(recording, call, eval_graph, where)
    read_live = {str(node.target) for node in eval_graph.nodes if node.op == "get_attr"}
    locked = tuple(item for item in spy.locked() if item[0] not in read_live)
    return TracedBlock(call.path, eval_graph, nodes, anchors, locked)


def _check_kind(module: nn.Module, where: str) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise Refusal(f"{where} is TorchScript; convert the Python model, then script it")
    if isinstance(module, fx.GraphModule):
        raise Refusal(f"{where} is a torch.fx GraphModule; convert the model first, then trace it")
    if "forward" in module.__dict__:
        raise Refusal(f"{where} has a forward of its own on the instance, which an edited class cannot replace")


class _Spy:
    """A stand-in for a module that shares its children and notes what its own forward touches."""

    def __init__(self, module: nn.Module) -> None:
        self.reads: dict[str, Any] = {}
        self.writes: set[str] = set()
        self.methods: set[str] = set()
        base = type(module)
        plain = set(nn.Module().__dict__)

        def __getattribute__(this: Any, name: str) -> Any:
            value = base.__getattribute__(this, name)
            if name not in plain and not (name.startswith("__") and name.endswith("__")):
                if name in object.__getattribute__(this, "__dict__") or _is_class_state(base, name):
                    self.reads.setdefault(name, value)
                elif inspect.ismethod(value) and not hasattr(nn.Module, name) and name != "forward":
                    self.methods.add(name)
            return value

        def __getattr__(this: Any, name: str) -> Any:
            try:
                value = base.__getattr__(this, name)
            except AttributeError:  # `hasattr(self, ...)`: that there is none is baked
                if not name.startswith("__"):
                    self.reads.setdefault(name, _ABSENT)
                raise
            if value is None:  # an absent child, parameter or buffer: its absence is baked
                self.reads.setdefault(name, None)
            return value

        def __setattr__(this: Any, name: str, value: Any) -> None:
            if name != "training":
                self.writes.add(name)
            base.__setattr__(this, name, value)

        members = {
            "__getattribute__": __getattribute__,
            "__getattr__": __getattr__,
            "__setattr__": __setattr__,
            "__module__": base.__module__,
        }
        self.kind = quiet_subclass(base, members)
        self.module = module
        self.stand_in: nn.Module = module

    def fresh(self, training: bool) -> nn.Module:
        """A new stand-in; the spy starts to note from here."""
        stand_in: nn.Module = self.kind.__new__(self.kind)
        state = dict(self.module.__dict__)
        for name in ("_modules", "_parameters", "_buffers"):
            state[name] = state[name].copy()
        state["training"] = training
        plain = nn.Module().__dict__
        self.held = {name: value for name, value in state.items() if name not in plain and _has_state(value)}
        self.snapshots = {name: _snapshot(value) for name, value in self.held.items()}
        object.__getattribute__(stand_in, "__dict__").update(state)
        return stand_in

    def changed(self) -> list[str]:
        """Attributes whose containers or objects the forward wrote into."""
        return [name for name, value in self.held.items() if not _alike(_snapshot(value), self.snapshots[name])]

    def locked(self) -> Locked:
        """What the forward read, as (name, value); values that do not compare simply are opaque."""
        return tuple(sorted((name, value if _is_simple(value) else _OPAQUE) for name, value in self.reads.items()))


def _is_class_state(base: type[nn.Module], name: str) -> bool:
    """Whether `name` is a plain value, or a slot, of a user's class: an instance could be given its own."""
    if hasattr(nn.Module, name):
        return False
    value = inspect.getattr_static(base, name, _SIMPLE)
    return value is not _SIMPLE and (inspect.ismemberdescriptor(value) or not hasattr(type(value), "__get__"))


def _has_state(value: Any) -> bool:
    """Whether a forward could write into `value` unseen: a container, or an object of a user's class."""
    if type(value) in _CONTAINERS:
        return True
    known = isinstance(value, (torch.Tensor, nn.Module, type, *_SIMPLE[:-1])) or callable(value)
    return not known and isinstance(getattr(value, "__dict__", None), dict)


def _snapshot(value: Any, depth: int = 3) -> Any:
    """Containers (and attributes of objects) as nested tuples, whose leaves compare by identity."""
    if depth and type(value) in _CONTAINERS:
        items = list(value.items()) if isinstance(value, dict) else list(value)
        return tuple(_snapshot(item, depth - 1) for item in items)
    if depth and type(value) is tuple:
        return tuple(_snapshot(item, depth) for item in value)
    if depth and _has_state(value):
        return tuple((name, _snapshot(item, depth - 1)) for name, item in vars(value).items())
    return value


def _alike(a: Any, b: Any) -> bool:
    if type(a) is tuple and type(b) is tuple:
        return len(a) == len(b) and all(map(_alike, a, b))
    return a is b


def _is_simple(value: Any) -> bool:
    if isinstance(value, tuple):
        return type(value) is tuple and all(_is_simple(item) for item in value)
    return type(value) in _SIMPLE


class BlockTracer(fx.Tracer):
    """Traces one forward with every child a leaf; flags among its arguments are bound to recorded values."""

    def __init__(self) -> None:
        super().__init__()
        self.proxy_buffer_attributes = True
        self.arguments: dict[str, Any] = {}

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
        for parameter in list(inspect.signature(root_fn).parameters.values())[1:]:
            default = () if parameter.default is parameter.empty else (parameter.default,)
            proxy: Any = self.create_proxy("placeholder", parameter.name, default, {})
            value = self.arguments[parameter.name]
            if parameter.kind is parameter.KEYWORD_ONLY:
                by_name.append(parameter.name)
            if value is None or isinstance(value, (bool, str)):
                self.create_proxy("call_function", expect_argument, (proxy, value, parameter.name), {})
                args.append(value)
            elif isinstance(value, (list, tuple)) and _holds_tensor(value):
                self.create_proxy("call_function", expect_length, (proxy, len(value), parameter.name), {})
                args.append(type(value)(proxy[index] for index in range(len(value))))
            else:
                args.append(proxy)
        if not by_name:
            return root_fn, args
        split = len(args) - len(by_name)
        return lambda *given: root_fn(*given[:split], **dict(zip(by_name, given[split:], strict=True))), args


def expect_argument(found: Any, expected: Any, name: str) -> None:
    """Generated code calls this for an argument whose recorded value its graph was traced with."""
    if not (found is expected or found == expected):
        raise RuntimeError(
            f"this converted block was traced with {name}={expected!r} and got {found!r}; "
            "convert the model with a forward that passes it so"
        )


def expect_length(found: Any, expected: int, name: str) -> None:
    """Generated code calls this for a list of tensors, whose recorded length its graph was traced with."""
    if len(found) != expected:
        raise RuntimeError(
            f"this converted block was traced with {expected} tensors in {name} and got {len(found)}; "
            "convert the model with a forward that passes as many"
        )


def _trace(spy: _Spy, call: Call, training: bool, where: str) -> fx.Graph:
    for _ in range(_TRIES):
        chance = _random_states()
        graph = _trace_once(spy, call, training, where)
        if _random_states() == chance:
            return graph
    raise Refusal(f"the forward of {where} draws random numbers of its own")


def _trace_once(spy: _Spy, call: Call, training: bool, where: str) -> fx.Graph:
    stand_in = spy.fresh(training)
    tracer = BlockTracer()
    tracer.arguments = _bind(stand_in, call, where)
    spy.writes.clear()
    try:
        with _counting_autocasts() as autocasts, _Draws() as draws:
            graph = tracer.trace(stand_in)
    except Exception as error:
        raise Refusal(
            f"the forward of {where} cannot be traced: {type(error).__name__}: {first_line(error)}"
        ) from error
    if autocasts:
        raise Refusal(f"the forward of {where} switches autocast on or off, which a generated forward would lose")
    if draws.seen:
        raise Refusal(f"the forward of {where} draws random numbers of its own")
    if changed := spy.changed():
        raise Refusal(f"the forward of {where} writes into its own attribute `{changed[0]}`")
    if writes := sorted(name for name in spy.writes if not name.startswith("_tensor_constant")):
        raise Refusal(f"the forward of {where} writes its own attribute `{writes[0]}`")
    for node in graph.nodes:
        node.type = None  # annotations may name what only the block's own file imports
    return graph


@contextmanager
def _counting_autocasts() -> Iterator[list[torch.autocast]]:
    """Collects the autocast contexts entered meanwhile: operations on meta tensors show no trace of them."""
    entered: list[torch.autocast] = []
    enter: Any = torch.autocast.__enter__
    here = threading.get_ident()

    def note(self: torch.autocast) -> Any:
        if threading.get_ident() == here:
            entered.append(self)
        return enter(self)

    torch.autocast.__enter__ = note  # type: ignore[method-assign]
    try:
        yield entered
    finally:
        torch.autocast.__enter__ = enter  # type: ignore[method-assign]


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees random numbers that are drawn while tracing, which would become constants."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = self.seen or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


_TRIES = 4  # other threads may draw from the same generators meanwhile


def _random_states() -> tuple[Any, ...]:
    """Of the generators that are not torch's."""
    numpy = sys.modules.get("numpy")
    drawn = () if numpy is None else numpy.random.get_state()[1:3]
    return (random.getstate(), *(str(part) for part in drawn))


def _bind(module: nn.Module, call: Call, where: str) -> dict[str, Any]:
    signature = inspect.signature(type(module).forward)
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in signature.parameters.values()):
        raise Refusal(f"the forward of {where} takes *args or **kwargs")
    args, kwargs = call.arguments
    bound = signature.bind(module, *args, **kwargs)
    bound.apply_defaults()
    return dict(list(bound.arguments.items())[1:])


def _holds_tensor(tree: Any) -> bool:
    tensors: list[torch.Tensor] = []
    _collect((tree,), tensors)
    return bool(tensors)


def _resolves(module: nn.Module, path: str) -> bool:
    try:
        for name in path.split("."):
            module = getattr(module, name)
    except AttributeError:
        return False
    return True


class _LinkingInterpreter(fx.Interpreter):
    """Runs a graph under a recorder and notes which node issued each operation and made each value."""

    def __init__(self, module: nn.Module, graph: fx.Graph, recorder: Recorder) -> None:
        super().__init__(module, garbage_collect_values=False, graph=graph)
        self.recorder = recorder
        self.node_of_value: dict[int, fx.Node] = {}
        self.node_of_op: list[fx.Node] = []
        self.results: dict[fx.Node, tuple[tuple[Any, ...], int]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """One node."""
        result = super().run_node(n)
        self.node_of_op += [n] * (len(self.recorder.ops) - len(self.node_of_op))
        if isinstance(result, torch.Tensor) and n.op != "output":
            value = self.recorder.value(result)
            self.node_of_value.setdefault(value, n)
            self.results[n] = (_key(result), value)
        return result


def _link(
    recording: Recording, call: Call, graph: fx.Graph, where: str
) -> tuple[dict[int, fx.Node], dict[int, fx.Node]]:
    """Self-check in both modes; then nodes by recorded value and by recorded operation."""
    module = recording.modules[call.path]
    names = {_storage(t): name for name, t in [*module.named_parameters(), *module.named_buffers()]}
    for training in (True, False):
        _set_training(module, training)
        try:
            arguments = _repeat_batch(call.arguments) if training else call.arguments
            original, ops_before = _run_original(module, arguments, names)
            traced, ops_after, interpreter = _run_graph(module, graph, arguments, names, call, where)
            if _restore_in_place(ops_before, ops_after, interpreter.node_of_op):
                traced, ops_after, interpreter = _run_graph(module, graph, arguments, names, call, where)
        except Refusal:
            raise
        except Exception as error:
            if training and original_fails(module, call, names):
                continue
            raise Refusal(f"the traced forward of {where} fails: {first_line(error)}") from error
        finally:
            _set_training(module, False)
        alike = [op.kind for op in ops_before] == [op.kind for op in ops_after]
        if alike and [op.grad for op in ops_before] != [op.grad for op in ops_after]:
            raise Refusal(f"the forward of {where} switches gradients on or off, which a generated forward would lose")
        if original != traced or ops_before != ops_after:
            mode = "train" if training else "eval"
            raise Refusal(f"the traced forward of {where} does not do what the original does in {mode} mode")
    recorded = recording.ops[call.ops.start : call.ops.stop]
    if [op.kind for op in recorded] != [op.kind for op in ops_after]:
        raise Refusal(f"the forward of {where} does not do the same twice")
    to_global = _value_table(call, recorded, ops_after)
    _follow_in_place(graph, interpreter)
    nodes = {to_global[value]: node for value, node in interpreter.node_of_value.items() if value in to_global}
    anchors = {recorded[i].index: node for i, node in enumerate(interpreter.node_of_op)}
    return nodes, anchors


def _follow_in_place(graph: fx.Graph, interpreter: _LinkingInterpreter) -> None:
    """Let what reads a tensor after an in-place operation on it read that operation's result, the same tensor.

    After `F.relu_(y)` whose result is dropped, `y` means the activation; an edit behind it must reach `y`.
    """
    place = {node: index for index, node in enumerate(graph.nodes)}
    latest: dict[tuple[Any, ...], fx.Node] = {}
    for node, (key, value) in interpreter.results.items():
        earlier = latest.get(key)
        if earlier is not None and interpreter.results[earlier][1] != value:
            for user in [user for user in earlier.users if place[user] > place[node]]:
                user.replace_input_with(earlier, node)
        latest[key] = node


_IN_PLACE = {
    operator.add: operator.iadd,
    operator.sub: operator.isub,
    operator.mul: operator.imul,
    operator.truediv: operator.itruediv,
}


def _restore_in_place(original: list[Op], traced: list[Op], nodes: list[fx.Node]) -> bool:
    """Give `x += y` back its in-place form, which torch.fx traces as `x + y`; whether there was one."""
    restored = False
    for before, after, node in zip(original, traced, nodes, strict=False):
        if before.kind == f"{after.kind}_" and node.target in _IN_PLACE:
            node.target = _IN_PLACE[node.target]
            restored = True
    return restored


def original_fails(module: nn.Module, call: Call, names: dict[int, str]) -> bool:
    """Whether the original itself cannot run in train mode on the recorded shapes."""
    _set_training(module, True)
    try:
        _run_original(module, _repeat_batch(call.arguments), names)
    except Exception:
        return True
    finally:
        _set_training(module, False)
    return False


def _run_original(module: nn.Module, arguments: Any, names: dict[int, str]) -> tuple[list[Value], list[Op]]:
    recorder = _recorder(arguments, names)
    args, kwargs = arguments
    lists = [item for item in (*args, *kwargs.values()) if isinstance(item, list)]
    before = [list(item) for item in lists]
    with torch.random.fork_rng(devices=[]), recorder:
        type(module).forward(module, *args, **kwargs)
    if any(a is not b for old, new in zip(before, lists, strict=True) for a, b in zip(old, new, strict=False)):
        raise Refusal(f"the forward of `{type(module).__name__}` changes a list it is given")
    return recorder.values, recorder.ops


def _run_graph(
    module: nn.Module, graph: fx.Graph, arguments: Any, names: dict[int, str], call: Call, where: str
) -> tuple[list[Value], list[Op], _LinkingInterpreter]:
    recorder = _recorder(arguments, names)
    replaced = Call(call.index, call.path, call.parent, call.inputs, call.outputs, call.ops, arguments)
    values = list(_bind(module, replaced, where).values())
    interpreter = _LinkingInterpreter(module, graph, recorder)
    with torch.random.fork_rng(devices=[]), recorder:
        interpreter.run(*values, enable_io_processing=False)
    return recorder.values, recorder.ops, interpreter


def _recorder(arguments: Any, names: dict[int, str]) -> Recorder:
    recorder = Recorder(names)
    tensors: list[torch.Tensor] = []
    _collect(arguments, tensors)
    for tensor in tensors:
        recorder.enter(tensor)
    return recorder


def _value_table(call: Call, recorded: tuple[Op, ...], local: list[Op]) -> dict[int, int]:
    table = dict(enumerate(call.inputs))
    for ours, theirs in zip(local, recorded, strict=True):
        table.update(zip(ours.outputs, theirs.outputs, strict=True))
    return table


def _repeat_batch(tree: Any) -> Any:
    """The arguments with batches of one doubled: batch norms in train mode need two values a channel."""
    if isinstance(tree, torch.Tensor):
        alone = tree.dim() > 1 and tree.shape[0] == 1
        return tree.expand(2, *tree.shape[1:]).clone() if alone else tree
    if isinstance(tree, (tuple, list)):
        return type(tree)(_repeat_batch(item) for item in tree)
    if isinstance(tree, dict):
        return {key: _repeat_batch(item) for key, item in tree.items()}
    return tree


def _set_training(module: nn.Module, training: bool) -> None:
    for child in module.modules():
        child.training = training
