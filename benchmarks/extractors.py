"""Whether a converted classifier and the converted feature extractor made of the same layers fit each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import padfree
from padfree.files.sources import Source


def feature_extractor(source: Source, model: nn.Module) -> nn.Module | None:
    """A model of timm in its `features_only` form, on meta; None where its keys are not among the model's."""
    if source.library != "timm":
        return None
    import timm

    try:
        with torch.device("meta"):
            features: nn.Module = timm.create_model(source.name, features_only=True)
    except Exception:  # timm says in many ways that a model has no such form, or cannot be built without weights
        return None
    return features if set(features.state_dict()) <= set(model.state_dict()) else None


def shared_keys(features: nn.Module, converted: nn.Module, plan: padfree.Plan) -> str:
    """How a feature extractor differs from the classifier when both are converted; "" where weights fit.

    Args:
        features: the extractor as it was.
        converted: the converted classifier.
        plan: the classifier's plan.
    """
    own = padfree.plan(features, input_size=plan.input_size, check=False)
    there = {key: value.shape for key, value in converted.state_dict().items()}
    here = {key: value.shape for key, value in own.apply(features).state_dict().items()} if own.matches else {}
    for key, shape in here.items():
        if there.get(key) != shape:
            return f"its features have `{key}` of shape {tuple(shape)}, the classifier {_shape(there.get(key))}"
    planned, found = ([(match.rule, match.name) for match in made.matches] for made in (plan, own))
    if own_modules := dict(features.named_modules()):
        planned = [(rule, name) for rule, name in planned if name in own_modules]  # it may lack the last layers
    missing = sorted(set(planned) ^ set(found))
    if missing:
        where = "features" if missing[0] in planned else "classifier"
        reasons = {skip.name: skip.reason for skip in (own if where == "features" else plan).skips}
        why = reasons.get(missing[0][1], "it is not looked at")
        return f"its {where} leave `{missing[0][1]}` as it is: {why}"
    return ""


def _shape(shape: Any) -> str:
    return "has none" if shape is None else f"of {tuple(shape)}"
