"""Converted networks in other libraries (extra `interop`): as docs/interop.md says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch.testing import assert_close

import padfree
import padfree.timm

pytestmark = pytest.mark.slow
IMAGE = (3, 160, 160)


@pytest.mark.parametrize(
    "name", ["mobilenetv3_small_050", "efficientnet_lite0", "mobilenetv4_conv_small", "mnasnet_small"]
)
def test_torch_pruning_prunes_what_it_prunes_of_the_original(name: str) -> None:
    pruning = pytest.importorskip("torch_pruning")
    left = []
    for convert in (lambda model: model, padfree.convert):
        model: Any = convert(timm.create_model(name)).eval()
        before = sum(parameter.numel() for parameter in model.parameters())
        pruner = pruning.pruner.MagnitudePruner(
            model,
            torch.randn(1, 3, 224, 224),
            importance=pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=0.25,
            ignored_layers=[model.get_classifier()],
        )
        pruner.step()
        left.append(sum(parameter.numel() for parameter in model.parameters()) / before)
        model.train()(torch.randn(2, 3, 224, 224)).sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert left[0] < 0.8
    assert_close(left[1], left[0], rtol=0.02, atol=0)


def test_transformers_saves_and_reads_networks_by_name(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.TimmWrapperConfig(architecture="padfree_test_resnet")
    wrapped = transformers.TimmWrapperForImageClassification(config).eval()
    assert padfree.is_converted(wrapped.timm_model)
    wrapped.save_pretrained(tmp_path)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    x = torch.randn(2, *IMAGE)
    with torch.no_grad():
        assert_close(again(x).logits, wrapped(x).logits, rtol=0, atol=0)
