"""Weight files that know their network: safetensors with the model's source and the plan in the metadata.

`load` builds the source model by name, applies the plan and loads the weights strictly. Nothing in a
file is evaluated, unpickled, downloaded or imported: only models of timm, torchvision and bsconv are built
by their names, from numbers, strings and lists, and no larger than the file's weights allow. Where the source
is a factory of the user's own, the caller of `load` passes that function.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from padfree.convert import Plan
from padfree.errors import FileError, PadfreeError
from padfree.files.bounds import check_content, check_input, size_limit
from padfree.files.checkpoint import KEY, load_weights, read_safetensors, some
from padfree.files.sources import BY_NAME, Source, SourceError
from padfree.files.writing import as_path, check_target, replacing
from padfree.layers.learned_groups import CONDENSED, condensed_at
from padfree.record.copies import bare_copy, kept_random_state
from padfree.record.inputs import example_inputs
from padfree.record.trees import collect, first_line

FILE_FORMAT = 1
Forms = dict[str, tuple[int, ...]]
Rebuild = Callable[[nn.Module, tuple[int, ...]], nn.Module]
FORMS: dict[str, tuple[Callable[[nn.Module], tuple[int, ...] | None], Rebuild]] = {
    "condensed": (lambda model: model.__dict__.get(CONDENSED), condensed_at)
}
"""Further forms of converted networks, by the name that files have for them, in the order in which they are given: what
tells the numbers that a network was given the form with (the size (C, H, W) at which it was fused, the stages of its
learned groups; None: it has not got it), and what gives it to a converted network in eval mode."""
_LARGER = 64  # pixels a side; on a map of a single point, pooling by mean and by maximum are the same
_TOLERANCE = 1e-4  # of the largest output; equal networks on equal inputs differ by rounding at most


def save(
    model: nn.Module, path: str | os.PathLike[str], source: Source | str | Mapping[str, Any] | None = None
) -> None:
    """Write a converted network to a safetensors file that `load` reads back.

    The file appears whole or not at all. Before, the network is rebuilt as `load` will do it, and must have
    the same keys, shapes and, for one random image, outputs in eval mode. The image has 64 pixels a side more
    than the plan's, or its size where the model does not take more. Outputs are not compared for models that
    fail on both or give other outputs when asked again, and where the network's own hooks compute its weights.
    What the file keeps is the architecture and the weights; what shows in none of these (dropout rates,
    training mode, frozen parameters) is not kept.

    Args:
        model: a network made by `convert` or `Plan.apply`, or what `fuse` made of one.
        path: where to write; the folder must exist.
        source: the unconverted model: "timm:NAME", "torchvision:NAME", "bsconv:NAME",
            "package.module:factory", or a dictionary with `library`, `name` and `kwargs` (numbers,
            strings, lists). May be left out for models of timm built without further arguments.

    Raises:
        FileError: no plan or no source is known, the source does not give this network, or the file
            cannot be written.
    """
    plan = getattr(model, "padfree_plan", None)
    if not isinstance(plan, Plan):
        raise FileError(f"{type(model).__name__} carries no plan: save takes what padfree.convert returned")
    origin = _timm_source(model, plan) if source is None else Source.from_dict(source)
    target = check_target(path)
    tensors = _tensors(model)
    try:
        content = {"format": FILE_FORMAT, "source": origin.to_dict(), "plan": plan.to_dict()}
        text = json.dumps(content | {"forms": _forms(model)})
    except (TypeError, ValueError) as error:
        raise FileError(f"{origin} cannot be written down: {error}; kwargs are numbers, strings, lists") from error
    _check_rebuilt(model, tensors, *_content(target, {KEY: text}))
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(target) as temporary:
        try:
            save_file(tensors, temporary, metadata={"format": "pt", KEY: text})
        except SafetensorError as error:  # a full disk among others
            raise FileError(f"cannot write {target}: {first_line(error)}") from error


def load(path: str | os.PathLike[str], *, factory: Callable[..., nn.Module] | None = None) -> nn.Module:
    """Rebuild a converted network from a file that `save` wrote, on the CPU, in eval mode.

    Args:
        path: of the file.
        factory: builds the unconverted network, in place of what the file names; it is called with the keyword
            arguments that the file keeps. Files whose source is a function ("package.module:factory") need it,
            because a file does not choose what is imported and called.

    Raises:
        FileError: the file is missing, damaged, truncated or not padfree's, its source cannot be built or needs
            `factory`, its plan does not fit the source any more, or its weights do not fit.
    """
    path = as_path(path)
    if factory is not None and not callable(factory):
        raise FileError(f"factory is {factory!r}; pass the function that builds the unconverted network")
    tensors, metadata = read_safetensors(path)
    source, plan, forms = _content(path, metadata)
    if factory is None and source.library == "factory":
        raise FileError(
            f"{path}: its network is built by {source.name!r}, which is not called because a file names it; if you "
            "trust that function, import it and pass it: load(path, factory=...)"
        )

    def build() -> nn.Module:
        if factory is not None:
            return factory(**source.kwargs)
        with size_limit(tensors):
            return source.create()

    try:
        model = _rebuild(build, plan, forms)
    except PadfreeError as error:
        raise FileError(f"{path}: {source} with the plan of this file cannot be built: {error}") from error
    floating = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(floating) == 1:
        model = model.to(floating.pop())
    load_weights(model, tensors, path)
    return model.eval()


def _forms(model: nn.Module) -> Forms:
    sizes = ((name, size_of(model)) for name, (size_of, _) in FORMS.items())
    return {name: size for name, size in sizes if size is not None}


def _rebuild(build: Callable[[], nn.Module], plan: Plan, forms: Forms) -> nn.Module:
    """The network of a builder and a plan, in its form, with fresh weights.

    Raises:
        PadfreeError: whatever went wrong; a damaged plan may ask for anything.
    """
    try:
        original = build()
        if not isinstance(original, nn.Module):
            raise SourceError(f"factory made a {type(original).__name__}, not an nn.Module")
        model = plan.apply(original, inplace=True)
        for name, (_, rebuild) in FORMS.items():
            if name in forms:
                model = rebuild(model.eval(), forms[name])
        return model
    except PadfreeError:
        raise
    except (Exception, SystemExit) as error:
        raise PadfreeError(f"{type(error).__name__}: {first_line(error)}") from error


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict on the CPU, each tensor with a storage of its own, as safetensors wants."""
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise FileError(f"`{key}` of the state dict is a {type(value).__name__}, not a tensor")
        if value.is_meta:
            raise FileError(f"`{key}` is on the meta device and has no values to save")
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        tensors[key] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return tensors


def _timm_source(model: nn.Module, plan: Plan) -> Source:
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, Mapping) or not config.get("architecture"):
        raise FileError(
            f"{type(model).__name__} does not say where it comes from; pass source=, such as "
            '"torchvision:mobilenet_v3_large" or "package.module:factory"'
        )
    kwargs: dict[str, Any] = {}
    if isinstance(getattr(model, "num_classes", None), int):
        kwargs["num_classes"] = model.num_classes
    if plan.input_size[0] != config.get("input_size", (3,))[0]:
        kwargs["in_chans"] = plan.input_size[0]
    return Source("timm", str(config["architecture"]).removeprefix(BY_NAME), kwargs)


def _check_rebuilt(model: nn.Module, tensors: Mapping[str, Tensor], source: Source, plan: Plan, forms: Forms) -> None:
    """Refuse to write a file that `load` could not read, or would read as another network."""
    with kept_random_state():
        try:
            rebuilt = _rebuild(source.create, plan, forms)
        except PadfreeError as error:
            raise FileError(f"{source} does not take this network's plan ({error}); pass source=") from error
        fresh = rebuilt.state_dict()
        wrong = set(fresh.keys() ^ tensors.keys())
        wrong |= {key for key in fresh.keys() & tensors.keys() if fresh[key].shape != tensors[key].shape}
        asked = f'pass source={{"library": "{source.library}", "name": "{source.name}", "kwargs": {{...}}}}'
        if wrong:
            raise FileError(
                f"{source} does not give this network: {len(wrong)} keys or shapes differ ({some(wrong)}); {asked} "
                "with the arguments that build it as it is now (num_classes of a new head); a network changed "
                "otherwise is kept whole by torch.save(model, path)"
            )
        rebuilt.load_state_dict(dict(tensors))
        if not _same_outputs(model, rebuilt, plan.input_size):
            raise FileError(
                f"{source} does not give this network: keys and shapes agree, but its outputs differ; {asked} "
                "with the arguments it was built with, or a factory of yours that builds it as it is now"
            )


def _same_outputs(model: nn.Module, rebuilt: nn.Module, size: tuple[int, ...]) -> bool:
    """Whether both compute the same from one random image; True where that cannot be told.

    Both run as copies in eval mode without hooks, on the CPU, in float32, from the same random state.
    """
    if any(module._forward_hooks or module._forward_pre_hooks for module in rebuilt.modules()):
        return True  # hooks of its own may compute its weights, as in weight_norm
    expected = _outputs(model, size)
    found = _outputs(rebuilt, size)
    return expected is None or _close(expected, found) or not _close(expected, _outputs(model, size))


def _outputs(model: nn.Module, size: tuple[int, ...]) -> list[Tensor] | None:
    """The tensors that a model gives for the first example that it takes, None if it takes none."""
    with kept_random_state(), torch.no_grad():
        try:
            duplicate = bare_copy(model).cpu().float().to(memory_format=torch.contiguous_format)
        except Exception:  # a class that cannot be copied, or not moved
            return None
        larger = (*size[:-2], size[-2] + _LARGER, size[-1] + _LARGER)
        examples = (example_inputs(duplicate, sides, meta=False) for sides in (larger, size))
        for example in itertools.chain.from_iterable(examples):
            outputs: list[Tensor] = []
            try:
                collect((duplicate(*example),), outputs)
            except Exception:  # the model's own code, which may raise anything
                continue
            return outputs
    return None


def _close(expected: list[Tensor], found: list[Tensor] | None) -> bool:
    if found is None or [t.shape for t in expected] != [t.shape for t in found]:
        return False
    for mine, theirs in zip(expected, found, strict=True):
        largest = float(mine[mine.isfinite()].abs().max()) if mine.isfinite().any() else 0.0
        if not torch.allclose(theirs.double(), mine.double(), rtol=0, atol=_TOLERANCE * largest, equal_nan=True):
            return False
    return True


def _numbers(values: Any) -> tuple[int, ...]:
    if type(values) is not list or any(type(value) is not int or value < 0 for value in values):
        raise TypeError(f"a form has {values!r}")
    return tuple(values)


def _content(path: Path, metadata: Mapping[str, str]) -> tuple[Source, Plan, Forms]:
    if KEY not in metadata:
        raise FileError(f"{path} was not written by padfree.save: it holds weights without a plan")
    check_content(path, metadata[KEY])
    try:
        content = json.loads(metadata[KEY])
        if not isinstance(content, dict) or content.get("format") != FILE_FORMAT:
            found = content.get("format") if isinstance(content, dict) else content
            raise FileError(f"{path} has format {found!r}; this padfree reads {FILE_FORMAT}")
        plan = Plan.from_dict(content["plan"])
        if not isinstance(plan, Plan):
            raise TypeError(f"a {type(plan).__name__}")
        forms = {name: _numbers(values) for name, values in content.get("forms", {}).items()}
        if unknown := sorted(forms.keys() - FORMS.keys()):
            raise FileError(f"{path} holds a network in the form {unknown[0]!r}; this padfree knows {sorted(FORMS)}")
        check_input(plan)
        return Source.from_dict(content["source"]), plan, forms
    except FileError:
        raise
    except (PadfreeError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FileError(f"{path} has damaged metadata: {type(error).__name__}: {first_line(error)}") from error
