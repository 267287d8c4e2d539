"""Classes with a generated forward: a subclass of a block's own class, built once per source.

The block stays the same object with the same children; only its class changes. Pickling and copying
rebuild the class from (base, source, names, locked), so they work in a fresh process.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import keyword
import linecache
import math
import weakref
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import fx, nn

from padfree.errors import Refusal
from padfree.rewrite.classes import quiet_subclass
from padfree.rewrite.containers import container_members
from padfree.rewrite.sealed import FUSERS, locking_members, sealed, sequential_members
from padfree.rewrite.stale import CHECK, check_member
from padfree.rewrite.views import GENERATED, SEALED, child_members
from padfree.types import NEW

Names = tuple[tuple[str, str, str], ...]  # (global name, module, qualified name)
Locked = tuple[tuple[str, Any], ...]
_MARK = "_padfree_base"


def graph_source(graphs: Sequence[fx.Graph], flags: tuple[str, ...] = ()) -> tuple[str, Names]:
    """The Python source of a forward, which begins with a look at what was baked in, and where its globals come from.

    Args:
        graphs: its bodies, one for each combination of the modes of `flags`, all in eval mode first.
        flags: paths of the modules whose `training` chooses the body, "" for the block itself.

    Raises:
        Refusal: it uses an object that cannot be imported by name.
    """
    sources: list[list[str]] = []
    values: dict[str, Any] = {}
    for graph in graphs:
        graph.lint()
        code, used = _python_code(graph)
        sources.append([part for line in code.strip().split("\n") for part in _unscripted(line)])
        for name, value in used.items():
            if name in values and _name(name, values[name]) != _name(name, value):
                raise Refusal(f"its forward uses two things of one name, {value!r} and {values[name]!r}")
            values[name] = value
    head = next(index for index, line in enumerate(sources[0]) if line.startswith("def ")) + 1
    if any(source[:head] != sources[0][:head] for source in sources):
        raise Refusal("its forward takes other arguments in training")
    text = sources[0]
    if flags:  # TorchScript lets no variable change its type inside an `if`, and torch.fx lets go of them so
        arguments = ", ".join(str(node.target) for node in graphs[0].nodes if node.op == "placeholder")
        calls = [f"return self.{NEW}body{index}({arguments})" for index in range(len(graphs))]
        text = [*sources[0][:head], *_branches(calls, flags)]
        for index, source in enumerate(sources):
            text += ["", source[head - 1].replace("def forward(", f"def {NEW}body{index}(", 1), *source[head:]]
    values["torch"] = torch
    text = [*text[:head], "    if not torch.jit.is_scripting():", f"        self.{CHECK}()", *text[head:]]
    return "\n".join(text) + "\n", tuple(_name(name, value) for name, value in sorted(values.items()))


def _unscripted(line: str) -> list[str]:
    """A line that looks at an argument, kept from TorchScript, which checks types instead and cannot read it."""
    if "padfree_rewrite_tracer_expect_" not in line:
        return [line]
    return ["    if not torch.jit.is_scripting():", f"    {line}"]


def _branches(calls: list[str], flags: tuple[str, ...]) -> list[str]:
    if not flags:
        return [f"    {calls[0]}"]
    half = len(calls) // 2
    evaluated, trained = (_branches(part, flags[1:]) for part in (calls[:half], calls[half:]))
    lines = [f"if {access(flags[0])}.training:", *trained, "else:", *evaluated]
    return [f"    {line}" for line in lines]


def access(path: str, root: str = "self") -> str:
    """Python text that reads the child, parameter or buffer at `path`, whatever its names are made of."""
    for name in filter(None, path.split(".")):
        plain = name.isascii() and name.isidentifier() and not keyword.iskeyword(name)
        root = f"{root}.{name}" if plain else f"getattr({root}, {name!r})"
    return root


def _python_code(graph: fx.Graph) -> tuple[str, dict[str, Any]]:
    """The code of a graph, with odd names of children quoted (torch.fx takes some for code), and its globals."""
    odd: dict[str, str] = {}
    changed: list[tuple[fx.Node, str]] = []
    for node in graph.nodes:
        if node.name == "self":  # what a child of that name makes
            node.name = f"{NEW}self"
        if node.op in ("call_module", "get_attr") and access(node.target) != f"self.{node.target}":
            changed.append((node, node.target))
            node.target = odd.setdefault(node.target, f"padfree_odd_{len(odd)}_")
    code = graph.python_code("self")
    for node, target in changed:
        node.target = target
    text = code.src
    for target, stand_in in odd.items():
        text = text.replace(f"self.{stand_in}", access(target))
    return text, code.globals


def _name(name: str, value: Any) -> tuple[str, str, str]:
    if isinstance(value, float) and not math.isfinite(value):
        return (name, "math", "nan" if math.isnan(value) else "inf")
    if isinstance(value, ModuleType):
        return (name, value.__name__, "")
    if value is type(None):
        return (name, "types", "NoneType")
    module = getattr(value, "__module__", None)
    qualified = getattr(value, "__qualname__", getattr(value, "__name__", ""))
    if module is None and getattr(torch, qualified, None) is value:
        module = "torch"
    try:
        if module is None or _resolve(module, qualified) is not value:
            raise AttributeError
    except (ImportError, AttributeError):
        raise Refusal(f"its forward uses {value!r}, which cannot be imported by name") from None
    return (name, module, qualified)


def _resolve(module: str, qualified: str) -> Any:
    found: Any = importlib.import_module(module)
    for part in filter(None, qualified.split(".")):
        found = getattr(found, part)
    return found


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class a module had before padfree gave it a generated forward (its own, if it has none)."""
    kind = type(module)  # a class made from a generated one (parametrized, say) is its own base
    base: type[nn.Module] = vars(kind).get(_MARK, kind)
    return base


def set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Give a module another class, past a `__setattr__` of the user's."""
    object.__setattr__(module, "__class__", kind)


def is_rewritten(module: nn.Module) -> bool:
    """Whether padfree gave this module a generated class that does more than keep its children."""
    return getattr(type(module), "_padfree_recipe", _GUARDED) != _GUARDED


def acting_class(module: nn.Module) -> type[nn.Module]:
    """The class that says what a module does: a generated one, or its original's where that only keeps its children."""
    return type(module) if is_rewritten(module) else original_class(module)


def has_generated_forward(module: nn.Module) -> bool:
    """Whether its forward is one that padfree wrote."""
    recipe: tuple[str, Names, Locked] = getattr(type(module), "_padfree_recipe", ("", (), ()))
    return bool(recipe[0])


def rewritten_class(base: type[nn.Module], source: str, names: Names, locked: Locked) -> type[nn.Module]:
    """A subclass of `base` whose forward is `source` ("" keeps the base's and only seals its fusers).

    Args:
        base: the module's original class.
        source: text of one `def forward(self, ...)`.
        names: its globals, by module and qualified name.
        locked: plain state that `source` was traced with; changing it raises `LockedStateError`.
    """
    # the same name may mean another function by now: notebooks define their helpers again and again
    functions = [_resolve(module, name) for _, module, name in names]
    functions.append(inspect.getattr_static(base, "forward", None))
    key = (base, source, names, repr(locked), tuple(map(id, functions)))
    found = _CLASSES.get(key)
    if found is None:
        found = _CLASSES[key] = _new_class(base, source, names, locked)
    return found


_CLASSES: weakref.WeakValueDictionary[tuple[Any, ...], type[nn.Module]] = weakref.WeakValueDictionary()


def sealed_class(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `base` that keeps its forward, and whose fusing methods raise."""
    return rewritten_class(base, "", (), ())


_GUARDED: tuple[str, Names, Locked] = ("", (), (("<kept>", True),))


def guarded_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module that refuses to set those children anew which must stay (`kept`), and is as it was else."""
    kind = type(module)
    return kind if hasattr(kind, "_padfree_recipe") else rewritten_class(kind, *_GUARDED)


def sealing_class(module: nn.Module, ends: Iterable[str]) -> type[nn.Module]:
    """The class of a module that also hands out views in the place of these children, which end a chain outside it."""
    kind: Any = type(module)
    source, names, locked = getattr(kind, "_padfree_recipe", ("", (), ()))
    known = dict(locked)
    known[SEALED] = tuple(sorted({*known.get(SEALED, ()), *ends}))
    return rewritten_class(original_class(module), source, names, tuple(known.items()))


def _new_class(base: type[nn.Module], source: str, names: Names, locked: Locked) -> type[nn.Module]:
    members: dict[str, Any] = {
        _MARK: base,
        "_padfree_recipe": (source, names, locked),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
    }
    if source:
        members |= _compile(base, source, names)
        if CHECK in source:
            members |= check_member(base, dict(locked))
    members |= locking_members(base, dict(locked) if source else {})
    ends = tuple(dict(locked).get(SEALED, ()))
    if ends and base.named_children is nn.Module.named_children:
        members |= child_members(ends)
    if source or ends:
        members |= container_members(base, ends)
    if source and issubclass(base, nn.Sequential):
        members |= sequential_members(base, ends)
    for name in FUSERS if (source, names, locked) != _GUARDED else ():
        if callable(getattr(base, name, None)):
            members[name] = sealed(name)
    made = quiet_subclass(base, members)
    if source:
        weakref.finalize(made, linecache.cache.pop, members["forward"].__code__.co_filename, None)
    return made


_count = itertools.count()  # of generated sources, so that no two share a file name


def _compile(base: type[nn.Module], source: str, names: Names) -> dict[str, Any]:
    """The forward that the source defines, and the bodies that it chooses from."""
    filename = f"{GENERATED}{base.__module__}.{base.__qualname__} {next(_count)}>"
    namespace: dict[str, Any] = {name: _resolve(module, qualified) for name, module, qualified in names}
    namespace["__name__"] = base.__module__
    globals_ = set(namespace)
    exec(compile(source, filename, "exec"), namespace)  # our own text, from a graph
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    made = {n: v for n, v in namespace.items() if n == "forward" or (n.startswith(f"{NEW}body") and n not in globals_)}
    for name, function in made.items():
        function.__module__, function.__qualname__ = base.__module__, f"{base.__qualname__}.{name}"
    return made


def _reduce(self: nn.Module, protocol: Any) -> Any:
    base = original_class(self)
    kind: Any = type(self)
    source, names, locked = kind._padfree_recipe
    getstate: Any = getattr(self, "__getstate__", None)  # object has none before Python 3.11
    state = self.__dict__ if getstate is None else getstate()
    return (rebuild, (base, source, names, locked), state)


def rebuild(base: type[nn.Module], source: str, names: Names, locked: Locked) -> nn.Module:
    """Unpickling entry: an empty instance of the generated class; its state follows."""
    kind = rewritten_class(base, source, names, locked)
    instance: nn.Module = kind.__new__(kind)
    return instance
