"""One model through padfree on meta tensors, with everything checked that a conversion promises."""

from __future__ import annotations

import copy
import math
import pickle
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

import padfree
from benchmarks.catalogue import input_size
from benchmarks.extractors import feature_extractor, shared_keys
from benchmarks.siblings import sibling_fault
from padfree.files.sources import Source
from padfree.record.inputs import example_inputs
from padfree.record.recording import Recording, record
from padfree.record.trees import Ref
from padfree.report.smallest import minimum_input
from padfree.rewrite.refusing import refused_methods

FIT = "fit"  # what `Result.shared_keys` says where nothing is wrong


@dataclass
class Result:
    """A row of the table.

    Attributes:
        status: "full" (all sites that the method defines a rewrite for), "part", "refused" (none), "nothing" (no
            candidates), "unbuilt"
            (the library itself cannot build or run it), or a fault: "crash", "broken", "keys", "timeout".
        depthwise, dense, projection, stem: matches by rule.
        candidates: what makes a model one with something to convert: stride-2 convolutions with an odd kernel of
            at least 3, and 3x3 stride-2 max-pools.
        sites: modules that run a learnt stride-2 convolution with an odd kernel, 1x1 shortcuts among them.
        dw_sites: those of them that are depthwise with a kernel of at least 3.
        located, dw_located: those of each that the plan names, as a match or as a skip.
        missing: the first sites that it does not name.
        depthwise_alone: whether the domains of depthwise sites convert with everything else left as it is (None: no
            such site).
        siblings: methods beside `forward` that raise in the converted network, because they would not agree with it.
            One that neither raises nor agrees makes the model "broken".
        shared_keys: "fit", or how the converted `features_only` form of a timm model does not fit its converted
            classifier, where the weights of the originals fit; "" where there is no such form.
        reason: why the first place was left alone, or what went wrong.
    """

    name: str
    status: str = "crash"
    depthwise: int = 0
    dense: int = 0
    projection: int = 0
    stem: int = 0
    skips: int = 0
    candidates: int = 0
    sites: int = 0
    dw_sites: int = 0
    located: int = 0
    dw_located: int = 0
    missing: list[str] = field(default_factory=list)
    depthwise_alone: bool | None = None
    params_before: int | None = None
    params_after: int | None = None
    macs_before: int | None = None
    macs_after: int | None = None
    minimum: int | None = None
    siblings: int = 0
    shared_keys: str = ""
    seconds: float = 0.0
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)


class Broken(Exception):
    """A conversion did not keep a promise."""


class KeysChanged(Broken):
    """The old keys, their order or their shapes are not what they were."""


def measure(name: str, *, features: bool = True) -> Result:
    """Build a model on the meta device, plan, convert and check it; whatever happens becomes a `Result`.

    Args:
        name: a source, such as "timm:resnet18".
        features: whether its `features_only` form is converted too (`Result.shared_keys`).
    """
    result = Result(name)
    begun = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _measure(result, features)
    except KeysChanged as error:
        result.status, result.reason = "keys", str(error)
    except Broken as error:
        result.status, result.reason = "broken", str(error)
    except Exception as error:  # the table must show any crash of padfree
        result.status, result.reason = "crash", f"{type(error).__name__}: {_first_line(error)}"
    result.seconds = round(time.perf_counter() - begun, 2)
    return result


def _measure(result: Result, features: bool) -> None:
    source = Source.from_dict(result.name)
    try:
        model, before = _build(source)
    except padfree.PadfreeError as error:
        result.status, result.reason = "unbuilt", _first_line(error)
        return
    result.params_before = _parameters(model)
    result.macs_before = macs(before)
    _locate(result, before, ())
    try:
        plan = padfree.plan(model, input_size=before.input_size)
    except padfree.PadfreeError as error:
        result.status, result.reason = "refused", _first_line(error)
        return
    _locate(result, before, (*plan.matches, *plan.skips))
    for match in plan.matches:
        setattr(result, match.rule, getattr(result, match.rule) + 1)
    left = [skip.reason for skip in plan.skips if skip.in_scope]
    result.skips, result.reason = len(left), left[0] if left else ""
    if not plan.matches:
        result.status = "refused" if result.candidates else "nothing"
        result.reason = result.reason or _refusal(model, before)
        return
    converted = plan.apply(model)
    after = record(converted, before.input_size)
    result.params_after, result.macs_after = _parameters(converted), macs(after)
    _check(model, converted, before, after)
    if result.dw_sites:
        result.depthwise_alone = _alone(model, before, plan)
    result.minimum = minimum_input(before, after)
    result.siblings = sum(len(refused_methods(type(module))) for module in converted.modules())
    if fault := sibling_fault(model, converted, before.input_size):
        raise Broken(fault)
    extractor = feature_extractor(source, model) if features else None
    result.shared_keys = "" if extractor is None else shared_keys(extractor, converted, plan) or FIT
    result.status = "part" if left else "full"


def _build(source: Source) -> tuple[nn.Module, Recording]:
    """On the meta device; with real weights where the network reads values while it is built or run."""
    size = input_size(source)
    try:
        with torch.device("meta"):
            model = source.create()
        return model, record(model, size)
    except padfree.PadfreeError:
        model = source.create().eval()
        return model, record(model, size)


def _locate(result: Result, recording: Recording, items: Sequence[padfree.Match | padfree.Skip]) -> None:
    """Strided convolutions and pools among the recorded operations, and whether a plan's items name them."""
    named = {item.name for item in items}
    for item in items:  # 1x1 branches that shrink with the conv beside them
        shrunk = item.operations[1:] if isinstance(item, padfree.Match) else ()
        named |= {recording.calls[recording.ops[op].call].path for op in shrunk}
    sites = _strided(recording)
    result.candidates = sum(max(kernel) >= 3 for kernel, _ in sites.values()) + _strided_pools(recording)
    depthwise = [path for path, (_, alone) in sites.items() if alone]
    missing = [path for path in sites if path not in named]
    result.sites, result.dw_sites = len(sites), len(depthwise)
    result.located, result.dw_located = len(sites) - len(missing), len(set(depthwise) - set(missing))
    result.missing = missing[:5]


def _strided(recording: Recording) -> dict[str, tuple[list[int], bool]]:
    """(kernel, whether it is depthwise and at least 3x3) of learnt stride-2 convs with an odd kernel, by module."""
    sites: dict[str, tuple[list[int], bool]] = {}
    for op in recording.ops:
        if op.kind != "convolution" or not op.inputs or len(recording.values[op.inputs[0]].shape) != 4:
            continue
        path = recording.calls[op.call].path if op.call >= 0 else ""
        _, weight, _, stride, _, _, transposed, _, groups = op.args[0]
        _, inner, *kernel = recording.values[weight.value].shape
        odd = not transposed and all(side % 2 for side in kernel)
        if list(stride) == [2, 2] and odd and any(True for _ in recording.modules[path].parameters()):
            sites[path] = (kernel, groups > 1 and inner == 1 and min(kernel) >= 3)
    return sites


def _strided_pools(recording: Recording) -> int:
    """How many 3x3 stride-2 max-pools run."""
    pools = [op.args[0] for op in recording.ops if op.kind == "max_pool2d_with_indices"]
    return sum(list(pool[1]) == [3, 3] and len(pool) > 2 and list(pool[2]) == [2, 2] for pool in pools)


def _alone(model: nn.Module, recording: Recording, plan: padfree.Plan) -> bool:
    """Whether something converts when only the domains with strided depthwise convolutions may."""
    depthwise = {path for path, (_, alone) in _strided(recording).items() if alone}
    items = (*plan.matches, *plan.skips)
    domains = {item.domain for item in items if item.name in depthwise}
    names = [item.name for item in items if item.domain in domains]
    return bool(names) and bool(padfree.plan(model, include=names, input_size=recording.input_size).matches)


def _refusal(model: nn.Module, recording: Recording) -> str:
    """What `convert` says when there is nothing to do."""
    try:
        padfree.convert(model, input_size=recording.input_size)
    except padfree.PadfreeError as error:
        return _first_line(error)
    raise Broken("convert did not raise though the plan is empty")


def _check(model: nn.Module, converted: nn.Module, before: Recording, after: Recording) -> None:
    old = {key: value.shape for key, value in model.state_dict().items()}
    new = {key: value.shape for key, value in converted.state_dict().items() if key in old}
    if list(old.items()) != list(new.items()):
        raise KeysChanged("the state dict's old keys, their order or their shapes changed")
    if not isinstance(converted, type(model)):
        raise Broken(f"it became a {type(converted).__name__}")
    if padfree.plan(converted, input_size=before.input_size).matches:
        raise Broken("converting it again finds something to convert")
    shapes = [[recording.values[index].shape for index in recording.outputs] for recording in (before, after)]
    if shapes[0] != shapes[1] and len(shapes[0]) == 1:
        raise Broken(f"its output changed from {tuple(shapes[0][0])} to {tuple(shapes[1][0])}")
    for label, duplicate in (("deepcopy", copy.deepcopy), ("pickle", lambda m: pickle.loads(pickle.dumps(m)))):
        if (why := _fails(duplicate, converted)) is not None and _fails(duplicate, model) is None:
            raise Broken(f"{label}: {why}")
    if (why := _fails(_train_step, converted, after)) is not None and _fails(_train_step, model, before) is None:
        raise Broken(f"training step: {why}")


def _train_step(model: nn.Module, recording: Recording) -> None:
    duplicate = copy.deepcopy(model).train()
    first = next(iter(example_inputs(duplicate, recording.input_size, meta=True)))
    output = duplicate(torch.cat([first[0], first[0]]))
    floats = [tensor for tensor in _tensors(output) if tensor.requires_grad]
    sum(tensor.float().mean() for tensor in floats).backward()  # type: ignore[union-attr]


def _fails(function: Any, *arguments: Any) -> str | None:
    try:
        function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {_first_line(error)}"
    return None


def _tensors(tree: Any) -> Iterable[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from _tensors(item)
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _tensors(item)


def macs(recording: Recording) -> int:
    """Multiply-adds of one image from what was recorded: convolutions, matrix products, norms (as fvcore weighs them).

    Unlike fvcore's total it holds attention's products where a fused kernel hides them, and no adaptive pools.
    """
    return sum(_macs(recording, op.kind, op.args, op.outputs) for op in recording.ops)


def _macs(recording: Recording, kind: str, args: tuple[Any, ...], outputs: tuple[int, ...]) -> int:
    shapes = [recording.values[item.value].shape for item in args[0] if isinstance(item, Ref)]
    out = recording.values[outputs[0]].shape if outputs else ()
    if kind in ("convolution", "_convolution"):
        transposed = bool(args[0][6])
        return shapes[0][0] * math.prod(shapes[1]) * math.prod((shapes[0] if transposed else out)[2:])
    if kind in ("mm", "bmm"):
        return math.prod(shapes[0]) * shapes[1][-1]
    if kind in ("addmm", "baddbmm"):
        return math.prod(shapes[1]) * shapes[2][-1]
    if kind in ("native_batch_norm", "_native_batch_norm_legit_no_training"):
        return 2 * math.prod(shapes[0])
    if kind in ("native_layer_norm", "native_group_norm"):
        return 5 * math.prod(shapes[0])
    return 0


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
