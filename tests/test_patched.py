"""Functions of torch's that somebody has put others in the place of, for a while or before padfree was imported."""

import subprocess
import sys
import threading
from collections import Counter
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.testing import assert_close

import padfree
from padfree import onepass
from tests.strangers import SIDE, Net, Unit, images
from tests.test_onepass import built, chain, modules_only, passes

CLOSE = {"rtol": 1e-5, "atol": 3e-5}

PATCHES = {
    "a convolution's weights": """
usual = nn.Conv2d._conv_forward
nn.Conv2d._conv_forward = lambda self, x, w, b: usual(self, x, w - w.mean((1, 2, 3), keepdim=True), b)
""",
    "a convolution": "usual = nn.Conv2d.forward\nnn.Conv2d.forward = lambda self, x: usual(self, x) * 2",
    "a norm": "usual = nn.BatchNorm2d.forward\nnn.BatchNorm2d.forward = lambda self, x: usual(self, x) + 1",
    "a function": "usual = F.batch_norm\nF.batch_norm = lambda *a, **k: usual(*a, **k) + 1",
    "an activation": "nn.ReLU.forward = lambda self, x: x.clamp(min=-0.5)",
    "every call": """
usual = nn.Module.__call__
def call(self, *a, **k):
    out = usual(self, *a, **k)
    return out * factor if factor != 1 and isinstance(self, nn.BatchNorm2d) else out
nn.Module.__call__ = call
""",
}
BEFORE = """
import torch, torch.nn.functional as F
from torch import nn
{patch}
import padfree
from tests.test_onepass import modules_only
from tests.strangers import Net, Unit
torch.manual_seed(0)
factor = 1
model = padfree.convert(Net(Unit()), input_size=(3, 16, 16), rules=("depthwise",)).eval()
x = torch.randn(2, 3, 16, 16)
factor = 1.5
with torch.no_grad():
    found = model(x)
    with modules_only():
        torch.testing.assert_close(found, model(x), rtol=1e-5, atol=3e-5)
"""


@built
@pytest.mark.parametrize("patch", PATCHES)
def test_a_patch_from_before_the_import(patch):
    script = BEFORE.format(patch=PATCHES[patch])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@built
@pytest.mark.parametrize("name", ["relu6", "batch_norm", "conv2d"])
def test_a_patch_that_is_taken_back(name):
    modules, x = tuple(chain(8, 3, 2, 0)), torch.randn(1, 8, 15, 16)
    usual = getattr(F, name)
    with torch.no_grad(), passes() as seen:
        expected = onepass.downsample(x, 3, 0, modules)
        with mock.patch.object(F, name, lambda *args, **settings: usual(*args, **settings)):
            assert_close(onepass.downsample(x, 3, 0, modules), expected, **CLOSE)
        assert len(seen) == 1
        assert_close(onepass.downsample(x, 3, 0, modules), expected, **CLOSE)
    assert len(seen) == 2


class NormAct(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(super().forward(x))


@built
def test_a_default_type_while_modules_are_read():
    conv, _, _ = chain(8, 3, 2, 0)
    modules, x = (conv, NormAct(8).eval()), torch.randn(1, 8, 15, 16)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), passes() as seen:
            onepass.downsample(x, 3, 0, modules)
    finally:
        torch.set_default_dtype(usual)
    assert seen == ["AFTER_ACTIVATION"]


@built
def test_a_default_device_is_nobody_who_looks_on():
    modules, x = tuple(chain(8, 3, 2, 0)), torch.randn(1, 8, 15, 16)
    with torch.no_grad(), torch.device("cpu"), passes() as seen:
        assert onepass.quick()
        onepass.downsample(x, 3, 0, modules)
    assert seen == ["AFTER_ACTIVATION"]


class Slotted:
    __slots__ = ()

    def __call__(self, x):
        return F.avg_pool2d(x, 3, 2) if x.shape[-1] == SIDE else x.relu()


@pytest.mark.parametrize(
    ("place", "other"),
    [("act", torch.Tensor.abs), ("act", Slotted()), ("conv", Slotted())],
    ids=["method", "slots", "conv"],
)
def test_callables_without_weak_references_in_the_place_of_modules(place, other):
    model = padfree.convert(Net(Unit()), input_size=(3, SIDE, SIDE), rules=("depthwise",)).eval()
    delattr(model.block, place)
    setattr(model.block, place, other)
    with torch.no_grad():
        found = model(images())
        with modules_only():
            assert_close(found, model(images()), **CLOSE)


def test_models_that_other_threads_run_while_one_is_converted():
    server, x = torchvision.models.resnet18(weights=None).eval(), torch.randn(1, 3, 32, 32)
    stop, results = threading.Event(), Counter()
    with torch.no_grad():
        expected = server(x)

    def serve():
        while not stop.is_set():
            try:
                with torch.no_grad():
                    results["right" if torch.allclose(server(x), expected, atol=1e-4) else "wrong"] += 1
            except Exception as error:
                results[repr(error)] += 1

    threads = [threading.Thread(target=serve) for _ in range(3)]
    try:
        for thread in threads:
            thread.start()
        for _ in range(2):
            padfree.convert(torchvision.models.mobilenet_v2(weights=None))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert set(results) == {"right"}
