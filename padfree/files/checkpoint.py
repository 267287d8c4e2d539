"""Weights of unconverted networks, as others write them: safetensors, or torch files of tensors alone."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from padfree.errors import FileError
from padfree.files.writing import as_path
from padfree.record.trees import first_line

KEY = "padfree"  # of the metadata, in files of converted networks
_WRAPPERS = ("state_dict", "model", "state_dict_ema", "model_ema")
_COUNT = ".num_batches_tracked"
_PREFIXES = ("module.", "_orig_mod.")
_AVERAGED = "n_averaged"  # an entry of `torch.optim.swa_utils.AveragedModel`
_TORCH_HEADS = (b"PK\x03\x04", b"\x80\x02")  # a zip archive; a pickle of older versions
_SHOWN = 3  # keys named in an error message
_ADVICE = 'save {"state_dict": model.state_dict()} alone, or safetensors'


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the weights of an unconverted network: safetensors, or a torch file of tensors alone.

    A state dict may lie under "state_dict" or "model", or else under "state_dict_ema" or "model_ema"; its
    keys may begin with what wrappers put before them ("module.", "_orig_mod.").

    Raises:
        FileError: the file is missing, unreadable, or holds anything but plain tensors.
    """
    path = as_path(path)
    if not path.is_file():
        raise FileError(f"{path}: no such file")
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


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        FileError: it is missing, damaged or another kind of file.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise FileError(f"{path} is damaged, truncated or not safetensors: {first_line(error)}") from error


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
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise FileError(f"{path} holds a {type(content).__name__}, not a state dict")
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
        raise FileError(f"{path} holds more than tensors; save model.state_dict() alone")
    return dict(content)


def _kind(value: Tensor) -> str:
    if value.is_meta:
        return "on the meta device"
    return "quantized" if value.is_quantized else "nested" if value.is_nested else "sparse"
