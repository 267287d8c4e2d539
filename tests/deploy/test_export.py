"""ONNX files and exported programs against the models they came from, down to the smallest image."""

import resource
import subprocess
import sys

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.testing import assert_close

import padfree
from padfree.deploy.onnx import to_onnx
from padfree.deploy.program import to_exported_program

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

SMALLEST = 13  # Tiny: the stem gives 7 of it, then 3, then 1


class Down(nn.Module):
    """An inverted bottleneck of stride 2."""

    def __init__(self, width):
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.BatchNorm2d(2 * width), nn.ReLU6())
        self.dw = nn.Conv2d(2 * width, 2 * width, 3, 2, 1, groups=2 * width, bias=False)
        self.bn, self.act = nn.BatchNorm2d(2 * width), nn.Hardswish()
        self.project = nn.Conv2d(2 * width, width, 1)

    def forward(self, x):
        return self.project(self.act(self.bn(self.dw(self.expand(x)))))


class Tiny(nn.Sequential):
    """A stem, two strided bottlenecks, a head; converted, it takes 13 pixels or more."""

    def __init__(self):
        stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
        super().__init__(stem, Down(8), Down(8), head)


def tiny():
    torch.manual_seed(0)
    model = padfree.convert(Tiny(), input_size=(3, 32, 32)).eval()
    assert {match.rule for match in model.padfree_plan.matches} == {"depthwise", "stem"}
    return model


def converted(name, **kwargs):
    torch.manual_seed(0)
    if name.startswith("torchvision "):
        model = getattr(torchvision.models, name.removeprefix("torchvision "))(**kwargs)
    else:
        model = timm.create_model(name, **kwargs)
    return padfree.convert(model).eval()


def images(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def run_onnx(path, x):
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input": x.numpy()})[0])


def expected(model, x):
    with torch.no_grad():
        return model(x)


class Block(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.stage = nn.Sequential(nn.ReLU(), inner)

    def forward(self, x):
        return self.stage(self.conv(x))


class Unwritable(nn.Module):
    def forward(self, x):
        return torch.linalg.matrix_exp(x)


class Undecided(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class FixedSide(nn.Module):
    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 4, 14, 14))

    def forward(self, x):
        return x + self.position


def test_onnx_file_runs_at_other_batches_and_sides_down_to_the_smallest(tmp_path):
    model = tiny()
    path = to_onnx(model, tmp_path / "model.onnx", (3, 32, 32))
    proto = onnx.load(path)
    assert [opset.version for opset in proto.opset_import if opset.domain == ""] == [18]
    dims = [d.dim_param or d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim]
    assert dims == ["batch", 3, "height", "width"]
    kinds = {node.op_type for node in proto.graph.node}
    assert "MaxPool" in kinds and "Max" not in kinds
    for shape in ((1, 3, 32, 32), (3, 3, 19, 50), (1, 3, SMALLEST, SMALLEST)):
        x = images(*shape)
        assert_close(run_onnx(path, x), expected(model, x), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError):
        expected(model, images(1, 3, SMALLEST - 1, SMALLEST - 1))


def test_exported_program_runs_at_other_batches_and_sides_down_to_the_smallest(tmp_path):
    model = tiny()
    path = to_exported_program(model, tmp_path / "model.pt2", (3, 32, 32))
    program = torch.export.load(path)
    assert not [n for n in program.graph.nodes if "maximum" in str(n.target)]
    for shape in ((1, 3, 32, 32), (3, 3, 19, 50), (1, 3, SMALLEST, SMALLEST)):
        x = images(*shape)
        assert_close(program.module()(x), expected(model, x), rtol=1e-5, atol=1e-5)


class Shuffled(Down):
    """Whose channels are shuffled: the tracer would have it that no map has a single pixel."""

    def forward(self, x):
        x = super().forward(x)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def test_exported_program_takes_shuffled_maps_of_a_single_pixel(tmp_path):
    torch.manual_seed(0)
    model = Tiny()
    model[1], model[2] = Shuffled(8), Shuffled(8)
    model = padfree.convert(model, input_size=(3, 32, 32)).eval()
    program = torch.export.load(to_exported_program(model, tmp_path / "model.pt2", (3, 32, 32))).module()
    for sides in ((13, 13), (14, 13), (19, 50), (32, 32)):
        x = images(2, 3, *sides)
        assert_close(program(x), expected(model, x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_exported_program_takes_maps_of_a_single_pixel(tmp_path):
    """ShuffleNetV2's, whose channels are shuffled."""
    import torchvision

    torch.manual_seed(0)
    model = padfree.convert(torchvision.models.shufflenet_v2_x0_5(), input_size=(3, 96, 96)).eval()
    program = torch.export.load(to_exported_program(model, tmp_path / "model.pt2", (3, 96, 96))).module()
    for sides in ((57, 57), (64, 57), (65, 96), (96, 96)):
        x = images(2, 3, *sides)
        assert_close(program(x), expected(model, x), rtol=1e-4, atol=1e-6)
    with pytest.raises(RuntimeError):
        expected(model, images(1, 3, 56, 56))


def test_fused_models_export_too(tmp_path):
    from padfree.deploy.fuse import fuse

    model = fuse(tiny(), input_size=(3, 32, 32))
    x = images(2, 3, 27, 32)
    path = to_onnx(model, tmp_path / "model.onnx", (3, 32, 32))
    assert_close(run_onnx(path, x), expected(model, x), rtol=1e-4, atol=1e-4)


def test_a_fixed_size_needs_dynamic_sides_off(tmp_path):
    model = Block(FixedSide()).eval()
    for write in (to_onnx, to_exported_program):
        with pytest.raises(padfree.PadfreeError, match="dynamic_sides=False"):
            write(model, tmp_path / "file", (3, 16, 16))
    path = to_onnx(model, tmp_path / "file", (3, 16, 16), dynamic_sides=False)
    dims = [d.dim_param or d.dim_value for d in onnx.load(path).graph.input[0].type.tensor_type.shape.dim]
    assert dims == ["batch", 3, 16, 16]
    x = images(5, 3, 16, 16)
    assert_close(run_onnx(path, x), expected(model, x), rtol=1e-4, atol=1e-4)


def test_errors_name_the_module_and_leave_no_file(tmp_path):
    target = tmp_path / "model.onnx"
    target.write_bytes(b"what was there before")
    with pytest.raises(padfree.PadfreeError, match=r"cannot be written as ONNX: `stage\.1`: .*matrix_exp"):
        to_onnx(Block(Unwritable()).eval(), target, (3, 16, 16), dynamic_sides=False)
    for write in (to_onnx, to_exported_program):
        with pytest.raises(padfree.PadfreeError, match=r"cannot be exported at 3x16x16: `stage\.1`: .*data-dep"):
            write(Block(Undecided()).eval(), target, (3, 16, 16))
    with pytest.raises(padfree.PadfreeError, match=r"exported at 7x16x16: `conv`: .*channels"):
        to_onnx(Block(nn.ReLU()).eval(), target, (7, 16, 16))
    assert target.read_bytes() == b"what was there before"
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_everything_a_user_can_get_wrong(tmp_path, monkeypatch):
    model = Block(nn.ReLU()).eval()
    size = (3, 16, 16)
    with pytest.raises(padfree.PadfreeError, match="opset is 17; the exporter takes 18 or more"):
        to_onnx(model, tmp_path / "model.onnx", size, opset=17)
    for write in (to_onnx, to_exported_program):
        with pytest.raises(padfree.PadfreeError, match="there is no folder"):
            write(model, tmp_path / "nowhere" / "model.onnx", size)
        with pytest.raises(padfree.PadfreeError, match="it is a folder"):
            write(model, tmp_path, size)
        for wrong in (None, 5, b"model.onnx", "a\0b"):
            with pytest.raises(padfree.PadfreeError, match="is not the path of a file"):
                write(model, wrong, size)
        with pytest.raises(padfree.PadfreeError, match="input_size is"):
            write(model, tmp_path / "model.onnx", (3, 16))
        with pytest.raises(padfree.PadfreeError, match="not str"):
            write("resnet18", tmp_path / "model.onnx", size)
    model.stage[0].train()
    for write in (to_onnx, to_exported_program):
        with pytest.raises(padfree.PadfreeError, match=r"`stage\.0` is in training mode"):
            write(model, tmp_path / "model.onnx", size)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(padfree.PadfreeError, match=r"writing ONNX needs onnxscript: pip install"):
        to_onnx(model.eval(), tmp_path / "model.onnx", size)
    assert list(tmp_path.iterdir()) == []


def test_an_opset_that_the_exporter_does_not_reach_is_an_error(tmp_path):
    model = Block(nn.ReLU()).eval()
    with pytest.raises(padfree.PadfreeError, match="writes Block with opset 18, not with 99"):
        to_onnx(model, tmp_path / "model.onnx", (3, 16, 16), opset=99)
    assert list(tmp_path.iterdir()) == []
    path = to_onnx(model, tmp_path / "model.onnx", (3, 16, 16), opset=20)
    assert [opset.version for opset in onnx.load(path).opset_import if opset.domain == ""] == [20]


def test_outputs_that_are_not_finite_cannot_be_checked(tmp_path):
    model = Block(nn.ReLU()).eval()
    model.conv.weight.data.fill_(float("nan"))
    with pytest.raises(padfree.PadfreeError, match="outputs of Block itself at 3x16x16 are not finite"):
        to_onnx(model, tmp_path / "model.onnx", (3, 16, 16))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_error(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 500, 9)).eval()  # about 0.5 MB
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        for write in (to_onnx, to_exported_program):
            with pytest.raises(padfree.PadfreeError, match=r"cannot write .*model: File too large"):
                write(model, tmp_path / "model", (3, 16, 16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


SWEEP = [
    "mobilenetv3_large_100",
    "tf_efficientnet_b0",
    "efficientnet_b0",
    "ghostnet_100",
    "resnet18",
    "resnet50",
    "regnety_002",
    "mixnet_s",
    "mobilenetv4_conv_small",
    "torchvision shufflenet_v2_x1_0",
    "torchvision mobilenet_v3_large",
    "torchvision mnasnet0_5",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", SWEEP)
def test_onnx_runtime_and_torch_agree_on_converted_models(name, tmp_path):
    model = converted(name)
    path = to_onnx(model, tmp_path / "model.onnx", (3, 128, 128))
    if name.startswith("tf_"):  # its SAME padding of the stem computes with ceil, which torch does not save
        with pytest.raises(padfree.PadfreeError, match=r"saved as a program: .*ceil.*dynamic_sides=False"):
            to_exported_program(model, tmp_path / "model.pt2", (3, 128, 128))
    free = not name.startswith("tf_")
    program = torch.export.load(to_exported_program(model, tmp_path / "model.pt2", (3, 128, 128), dynamic_sides=free))
    for shape in ((1, 3, 128, 128), (2, 3, 97, 128), (1, 3, 63, 63)):
        x = images(*shape)
        out = expected(model, x)
        assert_close(run_onnx(path, x), out, rtol=1e-4, atol=1e-4)
        if shape[2:] == (128, 128) or (free and min(shape[2:]) > 95):
            assert_close(program.module()(x), out, rtol=1e-4, atol=1e-4)


class Windows(nn.Sequential):
    """Pads its map to whole windows of seven, if it has to."""

    def forward(self, x):
        x = self[0](x)
        below, right = -x.shape[-2] % 7, -x.shape[-1] % 7
        if below > 0 or right > 0:
            x = nn.functional.pad(x, (0, right, 0, below))
        n, c, h, w = x.shape
        return x.reshape(n, c, h // 7, 7, w // 7, 7).amax((3, 5)).mean((2, 3))


def test_free_sides_that_the_file_does_not_follow_are_an_error(tmp_path):
    torch.manual_seed(0)
    model = Windows(nn.Conv2d(3, 8, 3, 2, 1)).eval()
    assert model(images(1, 3, 60, 92)).shape == (1, 8)
    with pytest.raises(padfree.PadfreeError, match="dynamic_sides=False"):
        to_onnx(model, tmp_path / "free.onnx", (3, 28, 28))
    assert not list(tmp_path.iterdir())
    assert to_onnx(model, tmp_path / "fixed.onnx", (3, 28, 28), dynamic_sides=False).exists()


class Chosen(nn.Module):
    """Keeps the rows that its input selects, and looks at how many there are: no tracer can know."""

    def forward(self, x):
        kept = x.flatten(1)[x.flatten(1).sum(1) > 0]
        return kept * 2 if kept.shape[0] > 3 else kept


def test_an_export_that_fails_says_so_in_one_short_line_and_prints_nothing(tmp_path, capfd):
    with pytest.raises(padfree.PadfreeError, match="Chosen cannot be exported at 3x8x8") as caught:
        to_onnx(Chosen().eval(), tmp_path / "a.onnx", (3, 8, 8), dynamic_sides=False)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert capfd.readouterr() == ("", "")


class Sevenfold(nn.Module):
    """Windows of 7x7 pixels: the map must be made of whole ones."""

    def __init__(self):
        super().__init__()
        self.conv, self.inner = nn.Conv2d(3, 4, 3, 2, 1), nn.Identity()

    def forward(self, x):
        y = self.inner(self.conv(x))
        assert y.shape[-1] % 7 == 0, "whole windows"
        return y.unflatten(-1, (-1, 7)).mean((-1, -2, -3))


def test_a_network_tied_to_its_windows_is_known_before_it_is_traced(tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("traced")

    model = Sevenfold().eval()
    with monkeypatch.context() as patched:
        patched.setattr(torch.export, "export", never)
        with pytest.raises(
            padfree.PadfreeError, match=r"takes 3x28x28 and not 3x60x92: .*whole windows.*--fixed-sides"
        ):
            to_onnx(model, tmp_path / "a.onnx", (3, 28, 28))
        with pytest.raises(padfree.PadfreeError, match="traced"):
            to_onnx(model, tmp_path / "a.onnx", (3, 28, 28), dynamic_sides=False)


def test_importing_padfree_is_enough():
    command = [sys.executable, "-c", "import padfree; print(padfree.export.to_onnx.__name__)"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "to_onnx\n"


def test_the_1x1_of_a_stem_is_two_convolutions_in_the_file(tmp_path):
    model = tiny()
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    path = to_onnx(model, tmp_path / "model.onnx", (3, 32, 32))
    nodes = onnx.load(path).graph.node
    assert not {"Concat", "BatchNormalization"} & {node.op_type for node in nodes}
    convs = [node for node in nodes if node.op_type == "Conv"]
    assert len(convs) == 4 + 2 * 3  # the stem's, its depthwise one and both halves; three a block
    x = images(2, 3, 40, 32)
    assert_close(run_onnx(path, x), expected(model, x), rtol=1e-4, atol=1e-4)
