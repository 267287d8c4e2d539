"""`build`: what stands behind every name: timm's own network, its weights, the conversion, a true description."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from timm.models import (
    FeatureGraphNet,
    get_arch_pretrained_cfgs,
    is_model,
    load_pretrained,
    load_state_dict,
    model_entrypoint,
)
from torch import Tensor, nn

from padfree.convert import Plan, convert
from padfree.errors import PadfreeError
from padfree.files.checkpoint import some
from padfree.files.sources import BY_NAME
from padfree.record.inputs import default_input_size
from padfree.types import Options

MEASURED = ("pool_size", "test_pool_size", "min_input_size")
"""Fields of a description that hold of a network when it has been converted, not before."""

_logger = logging.getLogger(__name__)
_REPOSITORIES = ("hf-hub", "local-dir")  # sources that come with a `config.json`, which names the architecture
_OF_FEATURES = ("features_only", "out_indices", "feature_cls")
_INSIDE = ("model_", "body_", "graph_module_")  # where feature extractors of timm's hold the network
_OPTIONS = tuple(field.name for field in dataclasses.fields(Options))
_ARGUMENTS = tuple(set(inspect.signature(convert).parameters) - {"model", "options", "input_size", "inplace"})


def build(name: str, pretrained: bool, kwargs: Mapping[str, Any]) -> nn.Module:
    """The padding-free form of one of timm's networks.

    Weights of the original are loaded before the conversion, weights of a padding-free form after it. Where they are
    from a repository or folder, its `config.json` says which they are; those of a file are told by their keys.

    Args:
        name: of the original, without a tag.
        pretrained: load weights.
        kwargs: what `timm.create_model` passes on; `padfree` among them is a mapping of arguments of `padfree.convert`
            and fields of `padfree.Options`, `{"rules": ["depthwise"], "merge": "norm"}`, or a plan, `{"plan": ...}`.

    Raises:
        NothingToConvertError: the network has nothing to convert, built like this.
        PadfreeError: `padfree` holds something else, or weights do not fit.
    """
    recipe = Recipe.of(name, kwargs)
    whole = _with_own_weights(recipe) if pretrained else None
    if whole is not None and recipe.whole == recipe:
        return whole
    model = recipe.converted(recipe.original(pretrained and whole is None))
    if whole is not None:
        _take_over(model, whole.state_dict(), name)
    elif pretrained:
        _logger.info("padfree: weights of %s were loaded, then it was converted", name)
    return model


def named(converted: nn.Module) -> nn.Module:
    """Give a network of timm's that `padfree.convert` converted what one built by name has; returns it.

    Its description then names `padfree_<name>` and its arguments hold its plan, so that `timm.models.save_for_hf` and
    `timm.create_model("local-dir:...")` give the same network, and no original is built where its weights are meant.

    Raises:
        PadfreeError: it carries no plan, or its description names no network of timm's.
    """
    made, described = getattr(converted, "padfree_plan", None), getattr(converted, "pretrained_cfg", None)
    name = str(described.get("architecture") or "") if isinstance(described, Mapping) else ""
    if not isinstance(made, Plan) or not is_model(name):
        raise PadfreeError(
            f"{type(converted).__name__} is not a network of timm's that padfree.convert converted, or does not say "
            "which; build it with timm.create_model"
        )
    if name.startswith(BY_NAME):
        return converted
    new: Any = converted
    new.pretrained_cfg = new.default_cfg = {**_without_weights(described), "architecture": BY_NAME + name}
    # what `timm.create_model` keeps of its arguments, and `timm.models.get_model_args` reads
    new._model_args = {**getattr(converted, "_model_args", {}), "padfree": {"plan": made.to_dict()}}
    return converted


@dataclass(frozen=True)
class Recipe:
    """How a network is built: the original's name, the arguments of its builder, and those of the conversion.

    Called as a hook before a state dict is loaded, it takes one of the original in: the weights go through a conversion
    of their own (`timm.create_model(..., checkpoint_path=...)`).
    """

    name: str
    kwargs: Mapping[str, Any]
    conversion: Mapping[str, Any]
    from_repository: bool

    @classmethod
    def of(cls, name: str, kwargs: Mapping[str, Any]) -> Recipe:
        """Read what `timm.create_model` passes on."""
        built = dict(kwargs)
        conversion = _conversion(built.pop("padfree", None))
        given = built.get("pretrained_cfg")
        config = dataclasses.asdict(given) if dataclasses.is_dataclass(given) and not isinstance(given, type) else given
        own = False
        if isinstance(config, Mapping):
            of_this_name = config.get("architecture") in (None, BY_NAME + name)  # timm reads it and takes it out
            own = of_this_name and config.get("source") in _REPOSITORIES
            built["pretrained_cfg"] = _of_original(name, config)
        return cls(name, built, conversion, own)

    @property
    def whole(self) -> Recipe:
        """The recipe of the network that a feature extractor is taken from."""
        kwargs = {key: value for key, value in self.kwargs.items() if key not in _OF_FEATURES}
        return dataclasses.replace(self, kwargs=kwargs)

    def original(self, pretrained: bool = False) -> nn.Module:
        """Timm's own network."""
        model: nn.Module = model_entrypoint(self.name)(pretrained=pretrained, **self.kwargs)
        return model

    def converted(self, original: nn.Module) -> nn.Module:
        """The same network converted, with a true description."""
        model = self._traced_again(original) if isinstance(original, FeatureGraphNet) else self._convert(original)
        described = _without_weights(getattr(model, "pretrained_cfg", {})) | {"architecture": BY_NAME + self.name}
        model.pretrained_cfg = model.default_cfg = described
        kept = {key: _without_weights(value) for key, value in self.kwargs.items()}
        hook = dataclasses.replace(self, kwargs=kept)
        model.register_load_state_dict_pre_hook(hook)  # type: ignore[no-untyped-call]
        return model

    def _convert(self, original: nn.Module) -> nn.Module:
        size = default_input_size(original)
        if (sides := self.kwargs.get("img_size")) is not None:
            size = (size[0], *((sides, sides) if isinstance(sides, int) else sides))
        if (planned := self.conversion.get("plan")) is None:
            return convert(original, input_size=size, inplace=True, **self.conversion)
        return cast("nn.Module", planned.apply(original, inplace=True))

    def _traced_again(self, features: FeatureGraphNet) -> nn.Module:
        """`feature_cls="fx"`: a graph has lost the blocks that shortcuts go to, so the network is converted before it.

        Its parts are what is left to convert in the graph, and would give another network than the whole one.
        """
        whole = self.whole.original()
        whole.load_state_dict(features.graph_module.state_dict(), strict=False)  # the graph ends at its last feature
        converted = self._convert(whole.train(features.training))
        features.graph_module = FeatureGraphNet(converted, features.feature_info.out_indices).graph_module
        features.__dict__["padfree_plan"] = converted.__dict__["padfree_plan"]
        return features

    def keys_of_file(self) -> set[str] | None:
        """The keys of weights that are given as a file or a state dict, None if neither is."""
        config = self.kwargs.get("pretrained_cfg")
        given = {**(config if isinstance(config, Mapping) else {}), **(self.kwargs.get("pretrained_cfg_overlay") or {})}
        if given.get("state_dict"):
            return set(given["state_dict"])
        if not given.get("file") or given.get("custom_load") or given.get("source") in _REPOSITORIES:
            return None
        return set(load_state_dict(given["file"]))

    def __call__(
        self,
        module: nn.Module,
        state_dict: dict[str, Tensor],
        prefix: str,
        metadata: Mapping[str, Any],
        strict: bool,
        *faults: list[str],
    ) -> None:
        """Replace weights of the original by those of its conversion; anything else is left to torch."""
        own = module.state_dict().keys()
        if prefix or not state_dict.keys() < own:
            return
        original = self.original()
        if original.state_dict().keys() != state_dict.keys():
            return
        original.load_state_dict(dict(state_dict))
        model = self.converted(original.train(module.training))
        if model.state_dict().keys() == own:
            new = own - state_dict.keys()
            state_dict.update(model.state_dict())
            module.__dict__["padfree_plan"] = model.__dict__["padfree_plan"]  # how its new layers began
            _logger.warning(
                "padfree: these weights are of %s; they were loaded and converted. %d tensors of the new layers are "
                "untrained: train the network before you use it",
                self.name,
                len(new),
            )


def _conversion(given: Any) -> dict[str, Any]:
    """The keyword arguments of `convert`."""
    if given is not None and not isinstance(given, Mapping):
        raise PadfreeError(f"padfree={given!r}: it takes a mapping, such as {{'rules': ['depthwise']}}")
    arguments = dict(given or {})
    if arguments.keys() == {"plan"}:
        planned = arguments["plan"]
        return {"plan": planned if isinstance(planned, Plan) else Plan.from_dict(planned)}
    unknown = sorted(map(str, arguments.keys() - {*_ARGUMENTS, *_OPTIONS}))
    if unknown:
        raise PadfreeError(f"padfree={{{unknown[0]!r}: ...}}: it takes {', '.join(sorted((*_ARGUMENTS, *_OPTIONS)))}")
    options = Options(**{key: arguments.pop(key) for key in _OPTIONS if key in arguments})
    return {**arguments, "options": options}


def _without_weights(value: Any) -> Any:
    """An argument of a builder without the weights that a description may hold."""
    return {key: held for key, held in value.items() if key != "state_dict"} if isinstance(value, Mapping) else value


def _of_original(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A description that may be that of the padding-free form's name, as the original's builder takes it."""
    tag = config.get("tag")
    known = get_arch_pretrained_cfgs(name).get(f"{name}.{tag}" if tag else name)
    filled = dict(config)
    if known is not None and tuple(config.get("input_size") or ()) == tuple(known.input_size):
        filled |= {key: getattr(known, key) for key in MEASURED if config.get(key) is None}
    return filled | {"architecture": name}


def _with_own_weights(recipe: Recipe) -> nn.Module | None:
    """The whole converted network with weights of a converted one, None if the weights given are not such.

    Raises:
        PadfreeError: they are of the same network converted in another way.
    """
    keys = recipe.keys_of_file()
    if keys is None and not recipe.from_repository:
        return None
    original = recipe.whole.original()
    keys_before, described = set(original.state_dict()), dict(cast("Mapping[str, Any]", original.pretrained_cfg))
    model = recipe.whole.converted(original)
    if keys is not None:
        own = set(model.state_dict())
        if not (own - keys_before) & keys:
            return None
        if own != keys:
            raise PadfreeError(
                f"the weights are of {recipe.name} converted in another way: {some(own ^ keys)}; pass padfree={{...}} "
                "as it was when they were saved"
            )
    load_pretrained(
        model,
        pretrained_cfg=described | {"custom_load": False},
        num_classes=getattr(model, "num_classes", described.get("num_classes", 1000)),
        in_chans=default_input_size(model)[0],
        cache_dir=recipe.kwargs.get("cache_dir"),
    )
    _logger.info("padfree: weights of the padding-free form of %s were loaded", recipe.name)
    return model


def _take_over(features: nn.Module, weights: Mapping[str, Tensor], name: str) -> None:
    """Load a feature extractor from the whole network, whose names it joins with underscores or puts under its own."""
    by_name = {key.replace(".", "_"): value for key, value in weights.items()}
    taken: dict[str, Tensor] = {}
    for key in features.state_dict():
        joined = key.replace(".", "_")
        names = [joined, *(joined.removeprefix(prefix) for prefix in _INSIDE if joined.startswith(prefix))]
        value = next((by_name[name] for name in names if name in by_name), None)
        if value is None:
            raise PadfreeError(
                f"the weights of padfree_{name} have none for `{key}` of its feature extractor; build it without "
                "features_only, load them, and take features with hooks"
            )
        taken[key] = value
    features.load_state_dict(taken)
