"""What a model is run on: its input size, example arguments, random images; and whether it is a plain model at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from padfree.errors import PadfreeError

__all__ = ["check_input_size", "check_model", "default_input_size", "example_inputs", "like_of", "random_images"]


def random_images(model: nn.Module, size: tuple[int, ...], batch: int = 1) -> torch.Tensor:
    """(batch, *size) of values from 0 to 1, the same at every call, of the model's type and on its device."""
    images = torch.rand((batch, *size), generator=torch.Generator().manual_seed(0))
    return images.to(like_of(model))


def like_of(model: nn.Module) -> torch.Tensor:
    """What images for a model are like in type and device: its first floating-point parameter, or an empty tensor."""
    return next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))


_MOST_CHANNELS = 16  # of an image


def default_input_size(model: nn.Module) -> tuple[int, ...]:
    """(C, H, W) from the model's `pretrained_cfg` or `default_cfg`, else (3, 224, 224), or (3, 16, 224, 224) for video.

    A converted model's is the size it was converted at. The channel count of a model built with `in_chans=` is read
    from its first convolution.
    """
    planned = getattr(getattr(model, "padfree_plan", None), "input_size", None)
    if planned is not None:
        return check_input_size(planned)
    size: tuple[int, ...] = (3, 224, 224)
    for name in ("pretrained_cfg", "default_cfg"):
        config = getattr(model, name, None)
        found = config.get("input_size") if isinstance(config, Mapping) else getattr(config, "input_size", None)
        if found:
            size = tuple(int(side) for side in found)
            break
    convs = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Conv3d))]
    first = next((conv for conv in convs if isinstance(conv, nn.Conv2d)), None)
    if convs and first is None and len(size) == 3:
        return (size[0], 16, *size[1:])  # a video network
    if first is None or first.in_channels > _MOST_CHANNELS or len(size) != 3:
        return size
    return (first.in_channels, *size[1:])


def check_input_size(size: Any) -> tuple[int, ...]:
    """`size` as a tuple of 3 positive integers (C, H, W), or 4 for video (C, T, H, W).

    Raises:
        PadfreeError: it is not.
    """
    try:
        checked = tuple(int(side) for side in size)
        if len(checked) not in (3, 4) or min(checked) < 1 or any(a != b for a, b in zip(checked, size, strict=True)):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise PadfreeError(f"input_size is {size!r}; it takes (C, H, W), three positive integers") from None
    return checked


def image_channels(model: nn.Module) -> Iterator[int]:
    """Channels of an image that some convolution may read: the one registered first need not be the first to run."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)) and module.in_channels <= _MOST_CHANNELS:
            yield module.in_channels


def example_inputs(model: nn.Module, size: tuple[int, ...], meta: bool) -> Iterator[tuple[Any, ...]]:
    """Argument lists to try, in order: a batch, a list of images, two batches."""
    device = torch.device("meta") if meta else _device(model)
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    dtype = next(floating, torch.float32)
    batch = torch.rand((1, *size), device=device).to(dtype)
    yield (batch,)
    yield ([batch[0]],)
    yield (batch, batch.clone())


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def check_model(model: Any) -> None:
    """Refuse what is not a plain eager model.

    Raises:
        PadfreeError: with what to do instead.
    """
    if not isinstance(model, nn.Module):
        raise PadfreeError(f"convert takes a torch.nn.Module, not {type(model).__name__}")
    kind = f"{type(model).__module__}.{type(model).__name__}"
    try:
        modules = list(model.named_modules())
    except TypeError as error:
        raise PadfreeError(
            f"{kind} holds modules that cannot be told apart ({error}); a dataclass needs @dataclass(eq=False)"
        ) from error
    if "_orig_mod" in model._modules:
        raise PadfreeError(
            "the model is wrapped by torch.compile; convert first: torch.compile(padfree.convert(model))"
        )
    wrappers = (
        "DistributedDataParallel",
        "FullyShardedDataParallel",
        "DataParallel",
        "FSDPModule",
        "DeepSpeedEngine",
    )
    if any(base.__name__ in wrappers for base in type(model).__mro__):
        raise PadfreeError(
            f"the model is wrapped by {kind}; convert the model inside (model.module), then wrap it again"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise PadfreeError("the model is TorchScript; convert the Python model, then script or trace it")
    if isinstance(model, torch.fx.GraphModule):
        raise PadfreeError("the model is a torch.fx GraphModule; convert the model it was traced from, then trace")
    for name, module in modules:
        if isinstance(module, torch.ao.nn.quantized.FloatFunctional):
            continue  # the float form of an operation that can be quantized later
        packed = "_packed_params" in module.__dict__ or "_packed_params" in module._modules
        if packed or type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.nn.quantized")):
            raise PadfreeError(f"`{name}` is quantized; convert the float model, then quantize it")
        if any(base.__name__ in ("ObserverBase", "FakeQuantizeBase") for base in type(module).__mro__):
            raise PadfreeError(
                f"`{name}` observes or imitates int8: the model is prepared for quantization, and a shortcut added now "
                "would have no observer; convert the float model, then prepare it (with "
                "torch.ao.quantization.quantize_fx.prepare_fx or prepare_qat_fx, which also quantize sums)"
            )
