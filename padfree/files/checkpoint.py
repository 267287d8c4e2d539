"""Weights of unconverted networks, as others write them: safetensors, or torch files of tensors alone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from padfree.errors import FileError
from padfree.files.writing import as_path
from padfree.record.trees import first_line

KEY = "padfree"  # of the metadata, in files of converted networks
# where state dicts lie in what training writes: the trained ones before running averages of them
_TRAINED = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights", "params", "module")
_AVERAGES = (
    *("state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "model_ema_state_dict", "ema_model_state_dict"),
    *("ema", "net_ema", "params_ema"),
)
_COUNT = ".num_batches_tracked"
_PREFIXES = ("module.", "_orig_mod.")
_AVERAGED = "n_averaged"  # an entry of `torch.optim.swa_utils.AveragedModel`
_TORCH_HEADS = (b"PK\x03\x04", b"\x80\x02")  # a zip archive; a pickle of older versions
_SHOWN = 3  # keys named in an error message
_ADVICE = 'save {"state_dict": model.state_dict()} alone, or safetensors'


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the weights of an unconverted network: safetensors, or a torch file of tensors alone.

    A state dict may lie under "state_dict", "model", "model_state_dict", "net" and the like, or else under
    "ema", "state_dict_ema", "model_ema" and the like; its keys may begin with what wrappers put before them
    ("module.", "_orig_mod.").

    Raises:
        FileError: the file is missing, unreadable, or holds anything but plain tensors.
    """
    path = as_path(path)
    check_file(path)
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from error
    if head[8:] == b"{":
        content, metadata = read_safetensors(path)
        if KEY in metadata:
            raise FileError(f"{path} holds a converted network already; padfree.load reads it")
    else:
        content = _state_dict(path, _read_torch(path, head))
    for key, value in content.items():
        if value.layout != torch.strided or value.is_meta or value.is_quantized or value.is_nested:
            raise FileError(f"{path}: `{key}` is {_kind(value)}, not a plain tensor; {_ADVICE} of a plain model")
    return _unwrapped(content)


def _unwrapped(content: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what data parallelism, compilation and averaging add to keys."""
    prefixes = (prefix for prefix in _PREFIXES if content.keys() and all(key.startswith(prefix) for key in content))
    prefix = next(prefixes, None)
    if prefix is None:
        bare = {key: value for key, value in content.items() if key != _AVERAGED}
        averaged = len(bare) < len(content) and all(key.startswith(_PREFIXES[0]) for key in bare)
        return _unwrapped(bare) if averaged else content
    return _unwrapped({key.removeprefix(prefix): value for key, value in content.items()})


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], path: Path, *, any_age: bool = False) -> None:
    """Load a state dict strictly; the model is untouched when it does not fit.

    Args:
        model: it takes them.
        tensors: by key.
        path: where they come from, for messages.
        any_age: norms' counts of batches may be missing, as in files of before torch had them.

    Raises:
        FileError: keys are missing or unknown, shapes differ, or complex meets real; it names the first few.
    """
    own = model.state_dict()
    both = own.keys() & tensors.keys()
    parts = {
        "missing": {key for key in own.keys() - tensors.keys() if not (any_age and key.endswith(_COUNT))},
        "unknown": tensors.keys() - own.keys(),
        "of another shape": {key for key in both if own[key].shape != tensors[key].shape},
        "complex": {key for key in both if tensors[key].is_complex() and not own[key].is_complex()},
    }
    faults = [f"{len(keys)} {kind} ({some(keys)})" for kind, keys in parts.items() if keys]
    if faults:
        raise FileError(f"the weights in {path} do not fit {type(model).__name__}: keys {', '.join(faults)}")
    model.load_state_dict(dict(tensors))


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load the weights of an unconverted network from a file of others; the model is untouched when they do not fit.

    Where all keys begin alike ("model.", "backbone.", "encoder."), that prefix is left out if more of them fit then.

    Raises:
        FileError: see `read_checkpoint` and `load_weights`.
    """
    tensors, own = read_checkpoint(path), model.state_dict().keys()
    forms = [tensors, *_without_prefixes(tensors)]
    load_weights(model, max(forms, key=lambda form: len(own & form.keys())), Path(path), any_age=True)


def _without_prefixes(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Without the name that all keys begin with, as often as there is one."""
    while all("." in key for key in tensors) and len({key.partition(".")[0] for key in tensors}) == 1:
        tensors = {key.partition(".")[2]: value for key, value in tensors.items()}
        yield tensors


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        FileError: it is missing, damaged or another kind of file.
    """
    from safetensors import SafetensorError, safe_open

    check_file(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise FileError(f"{path} is damaged, truncated or not safetensors: {first_line(error)}") from error


def check_file(path: Path) -> None:
    """Refuse a path that leads to no file.

    Raises:
        FileError: it is a folder, or there is nothing.
    """
    if path.is_dir():
        raise FileError(f"{path} is a folder; pass the file in it that holds the weights")
    if not path.is_file():
        raise FileError(f"{path}: no such file")


def some(keys: set[str]) -> str:
    """The first few keys, for a message."""
    first = sorted(keys)[:_SHOWN]
    return ", ".join(first) + (", ..." if len(keys) > _SHOWN else "")


def _read_torch(path: Path, head: bytes) -> Any:
    """What a torch file holds, if that is tensors and plain containers."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle, end-of-file, runtime and key errors, by the kind of damage
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if not head.startswith(_TORCH_HEADS):
            why = "is neither safetensors nor a torch file"
        elif refused is not None:
            why = f"holds more than tensors ({refused[1]}), which weights_only reading refuses; {_ADVICE}"
        elif "TorchScript" in str(error):
            why = f"is TorchScript; {_ADVICE}"
        else:
            why = f"is damaged, truncated, or holds more than tensors; {_ADVICE}"
        raise FileError(f"{path} {why}") from error


def _state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    seen: set[int] = set()  # a pickle may hold itself
    while isinstance(content, Mapping) and id(content) not in seen and (key := _wrapper(path, content)) is not None:
        seen.add(id(content))
        content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise FileError(f"{path} holds a {type(content).__name__}, not a state dict")
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
        raise FileError(f"{path} holds more than tensors; save model.state_dict() alone")
    return dict(content)


def _wrapper(path: Path, content: Mapping[Any, Any]) -> str | None:
    """The key that a state dict lies under.

    Raises:
        FileError: there are several, and none of them goes before the others.
    """
    for names in (_TRAINED, _AVERAGES):
        held = [name for name in names if isinstance(content.get(name), Mapping) and content[name]]
        filled = [name for name in held if any(isinstance(item, (Tensor, Mapping)) for item in content[name].values())]
        if len(filled) > 1:
            raise FileError(f"{path} holds several networks ({', '.join(filled)}); {_ADVICE}, of the one you mean")
        if held:
            return (filled or held)[0]
    return None


def _kind(value: Tensor) -> str:
    if value.is_meta:
        return "on the meta device"
    return "quantized" if value.is_quantized else "nested" if value.is_nested else "sparse"
