"""Weight files that know their network: safetensors with the model's source and the plan in the metadata.

`load` builds the source model by name, applies the plan and loads the weights strictly. Nothing in a
file is evaluated or unpickled; but a source of kind "factory" names a function of the user's own code,
which `load` imports and calls, so open such files only where that code may run.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from padfree.convert import Plan
from padfree.errors import FileError, PadfreeError
from padfree.sources import Source

FILE_FORMAT = 1
_KEY = "padfree"
_SHOWN = 3  # keys named in an error message


def save(
    model: nn.Module, path: str | os.PathLike[str], source: Source | str | Mapping[str, Any] | None = None
) -> None:
    """Write a converted network to a safetensors file that `load` reads back.

    The file appears whole or not at all. What it keeps is the architecture and the weights; settings
    that change neither keys nor shapes (dropout rates, training mode, frozen parameters) are not kept.

    Args:
        model: a network made by `convert` or `Plan.apply`.
        path: where to write; the folder must exist.
        source: the unconverted model: "timm:NAME", "torchvision:NAME", "bsconv:NAME",
            "package.module:factory", or a dictionary with `library`, `name` and `kwargs`. May be left
            out for models of timm.

    Raises:
        FileError: no plan or no source is known, the source does not give this network, or the file
            cannot be written.
    """
    plan = getattr(model, "padfree_plan", None)
    if not isinstance(plan, Plan):
        raise FileError(f"{type(model).__name__} carries no plan: save takes what padfree.convert returned")
    origin = _timm_source(model) if source is None else Source.from_dict(source)
    target = check_target(path)
    tensors = _tensors(model)
    _check_source(origin, plan, tensors)
    content = {"format": FILE_FORMAT, "source": origin.to_dict(), "plan": plan.to_dict()}
    from safetensors.torch import save_file

    with replacing(target) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", _KEY: json.dumps(content)})


def load(path: str | os.PathLike[str]) -> nn.Module:
    """Rebuild a converted network from a file that `save` wrote, on the CPU, in eval mode.

    Raises:
        FileError: the file is missing, damaged, truncated or not padfree's, or its weights do not fit.
        PadfreeError: its source cannot be built, or its plan does not fit the source any more.
    """
    tensors, metadata = _read_safetensors(Path(path))
    source, plan = _content(Path(path), metadata)
    try:
        model = plan.apply(source.create(), inplace=True)
    except PadfreeError as error:
        raise FileError(f"{path}: {source} with the plan of this file cannot be built: {error}") from error
    floating = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(floating) == 1:
        model = model.to(floating.pop())
    load_weights(model, tensors, Path(path))
    return model.eval()


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the weights of an unconverted network: safetensors, or a torch file of tensors alone.

    A state dict may lie under "state_dict" or "model", and its keys may begin with "module.".

    Raises:
        FileError: the file is missing, unreadable, or holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from error
    if head[8:] == b"{":
        tensors, metadata = _read_safetensors(path)
        if _KEY in metadata:
            raise FileError(f"{path} holds a converted network already; padfree.load reads it")
        return tensors
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle, end-of-file, runtime and key errors, by the kind of damage
        raise FileError(
            f"{path} is neither safetensors nor a torch file that weights_only can read: {_first_line(error)}"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise FileError(f"{path} holds a {type(content).__name__}, not a state dict")
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
        raise FileError(f"{path} holds more than tensors; save model.state_dict() alone")
    prefix = "module." if all(key.startswith("module.") for key in content) else ""
    return {key.removeprefix(prefix): value for key, value in content.items()}


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load a state dict strictly; the model is untouched when it does not fit.

    Raises:
        FileError: keys are missing or unknown, or shapes differ; it names the first few.
    """
    own = model.state_dict()
    shapes = {key for key in own.keys() & tensors.keys() if own[key].shape != tensors[key].shape}
    parts = {
        "missing": own.keys() - tensors.keys(),
        "unknown": tensors.keys() - own.keys(),
        "of another shape": shapes,
    }
    faults = [f"{len(keys)} {kind} ({_some(keys)})" for kind, keys in parts.items() if keys]
    if faults:
        raise FileError(f"the weights in {path} do not fit {type(model).__name__}: keys {', '.join(faults)}")
    model.load_state_dict(dict(tensors))


def check_target(path: str | os.PathLike[str]) -> Path:
    """The path to write to, if its folder exists.

    Raises:
        FileError: the folder is missing, or the path is a folder.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileError(f"cannot write {target}: there is no folder {target.parent}")
    if target.is_dir():
        raise FileError(f"cannot write {target}: it is a folder")
    return target


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends well, else vanishes.

    Raises:
        FileError: the system refuses to write.
    """
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        mode = os.umask(0)
        os.umask(mode)
        temporary.chmod(0o666 & ~mode)  # mkstemp makes it private
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


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


def _timm_source(model: nn.Module) -> Source:
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, Mapping) or not config.get("architecture"):
        raise FileError(
            f"{type(model).__name__} does not say where it comes from; pass source=, such as "
            '"torchvision:mobilenet_v3_large" or "package.module:factory"'
        )
    kwargs: dict[str, Any] = {}
    if isinstance(getattr(model, "num_classes", None), int):
        kwargs["num_classes"] = model.num_classes
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is not None and first.in_channels != config.get("input_size", (3,))[0]:
        kwargs["in_chans"] = first.in_channels
    return Source("timm", str(config["architecture"]), kwargs)


def _check_source(source: Source, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
    """Refuse to write a file that could not be read: the source must give the same keys and shapes."""
    try:
        with torch.device("meta"):
            fresh = source.create()
        rebuilt = plan.apply(fresh, inplace=True).state_dict()
    except PadfreeError as error:
        raise FileError(f"{source} does not take this network's plan ({error}); pass source=") from error
    wrong = set(rebuilt.keys() ^ tensors.keys())
    wrong |= {key for key in rebuilt.keys() & tensors.keys() if rebuilt[key].shape != tensors[key].shape}
    if wrong:
        raise FileError(
            f"{source} does not give this network: {len(wrong)} keys or shapes differ ({_some(wrong)}); "
            "pass source= with the arguments it was built with"
        )


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise FileError(f"{path} is damaged, truncated or not safetensors: {_first_line(error)}") from error


def _content(path: Path, metadata: Mapping[str, str]) -> tuple[Source, Plan]:
    if _KEY not in metadata:
        raise FileError(f"{path} was not written by padfree.save: it holds weights without a plan")
    try:
        content = json.loads(metadata[_KEY])
        if not isinstance(content, dict) or content.get("format") != FILE_FORMAT:
            found = content.get("format") if isinstance(content, dict) else content
            raise FileError(f"{path} has format {found!r}; this padfree reads {FILE_FORMAT}")
        plan = Plan.from_dict(content["plan"])
        if not isinstance(plan, Plan):
            raise TypeError(f"a {type(plan).__name__}")
        return Source.from_dict(content["source"]), plan
    except FileError:
        raise
    except (PadfreeError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FileError(f"{path} has damaged metadata: {type(error).__name__}: {_first_line(error)}") from error


def _some(keys: set[str]) -> str:
    first = sorted(keys)[:_SHOWN]
    return ", ".join(first) + (", ..." if len(keys) > _SHOWN else "")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
