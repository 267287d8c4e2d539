"""The runtimes of `benchmarks.deploy`: how each gets a network, and what is called in it.

A runtime is one function. It is given a network in eval mode, images and a folder, and returns a `Ready`: the bytes of
the file that a device would get, and what starts a session, a function from images to the first output. Sessions run on
one thread. Its own packages are imported inside, so that one which is missing is that runtime's affair alone.
"""

from __future__ import annotations

import copy
import importlib.util
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import padfree

Session = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Ready:
    """A network as a runtime takes it.

    Attributes:
        size: bytes of its file; None where there is no file.
        start: builds a session, as often as it is called; None where nothing of that kind runs on this machine.
    """

    size: int | None
    start: Callable[[], Session] | None


@dataclass(frozen=True)
class Runtime:
    """One column of the matrix.

    Attributes:
        packages: modules that must be there.
        bits: "fp32", and "int8" where it has it.
        prepare: given a network, batches of images (the first is the one that is run), an empty folder and one of
            `bits`, makes it ready.
        without: why it has no int8.
    """

    packages: tuple[str, ...]
    bits: tuple[str, ...]
    prepare: Callable[[nn.Module, list[Tensor], Path, str], Ready]
    without: str = ""

    def missing(self) -> str:
        """The packages that are not installed, "" for none."""
        return ", ".join(name for name in self.packages if importlib.util.find_spec(name) is None)


def onnx_file(model: nn.Module, images: list[Tensor], folder: Path, bits: str) -> Path:
    """The network as padfree writes it."""
    path = folder / "model.onnx"
    if bits == "int8":
        padfree.export.to_int8_onnx(model, path, images, dynamic_sides=False)
        return path
    return padfree.export.to_onnx(model, path, tuple(images[0].shape[1:]), dynamic_sides=False)


def program_of(model: nn.Module, image: Tensor) -> torch.export.ExportedProgram:
    """The network as a program for that one image."""
    with torch.no_grad():
        return torch.export.export(model, (image,))


def onnxruntime(model: nn.Module, images: list[Tensor], folder: Path, bits: str) -> Ready:
    """ONNX Runtime, on its own CPU provider."""
    import onnxruntime as ort

    content = onnx_file(model, images, folder, bits).read_bytes()

    def start() -> Session:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run(None, {"input": x.numpy()})[0])

    return Ready(len(content), start)


def openvino(model: nn.Module, images: list[Tensor], folder: Path, bits: str) -> Ready:
    """OpenVINO, from the ONNX file; in float32, which it would otherwise replace by bfloat16 where there is AMX."""
    import openvino as ov

    core = ov.Core()
    read = ov.convert_model(str(onnx_file(model, images, folder, bits)))
    read.reshape(list(images[0].shape))
    ov.save_model(read, str(folder / "model.xml"), compress_to_fp16=False)
    settings = {
        "INFERENCE_NUM_THREADS": 1,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }

    def start() -> Session:
        request = core.compile_model(read, "CPU", settings).create_infer_request()
        return lambda x: torch.from_numpy(request.infer([x.numpy()])[0])

    return Ready(_bytes(folder / "model.xml", folder / "model.bin"), start)


def ncnn(model: nn.Module, images: list[Tensor], folder: Path, _: str) -> Ready:
    """Tencent's ncnn, through TorchScript and pnnx, in float32."""
    import ncnn as runtime
    import pnnx

    path, shape = folder / "model.pt", ",".join(map(str, images[0].shape))
    with torch.no_grad():
        torch.jit.trace(model, images[0], check_trace=False).save(str(path))
    done = subprocess.run(
        [pnnx.EXEC_PATH, path.name, f"inputshape=[{shape}]", "fp16=0"], cwd=folder, capture_output=True, text=True
    )
    files = [folder / f"model.ncnn.{kind}" for kind in ("param", "bin")]
    if not all(file.is_file() for file in files):
        said = (done.stderr or done.stdout).strip().splitlines()
        raise RuntimeError(f"pnnx wrote no ncnn files (status {done.returncode}): {said[-1] if said else 'no word'}")

    def start() -> Session:
        net = runtime.Net()
        net.opt.num_threads = 1
        net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
        net.opt.use_bf16_storage = False
        net.load_param(str(files[0]))
        net.load_model(str(files[1]))

        def run(x: Tensor) -> Tensor:
            extractor = net.create_extractor()
            extractor.input("in0", runtime.Mat(x[0].numpy()))
            status, out = extractor.extract("out0")
            if status:
                raise RuntimeError(f"ncnn does not run the network (status {status}); an operation is missing")
            return torch.tensor(out.numpy())

        return run

    return Ready(_bytes(*files), start)


def executorch(model: nn.Module, images: list[Tensor], folder: Path, bits: str) -> Ready:
    """ExecuTorch with the XNNPACK backend; int8 by PT2E quantization, per channel."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.extension.pybindings import portable_lib

    image = images[0]
    program = program_of(quantized(model, images) if bits == "int8" else model, image)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    content = bytes(lowered.buffer)
    portable_lib._unsafe_reset_threadpool(1)  # the only way that the package has

    def start() -> Session:
        loaded = portable_lib._load_for_executorch_from_buffer(content)
        return lambda x: loaded.forward((x,))[0]

    return Ready(len(content), start)


def quantized(model: nn.Module, images: list[Tensor]) -> nn.Module:
    """The network in int8 by PT2E for XNNPACK, as a graph with quantize and dequantize operators."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(program_of(model, images[0]).module(), quantizer)
    with torch.no_grad():
        for batch in images:
            for image in batch.split(len(images[0])):
                prepared(image)
    converted: nn.Module = convert_pt2e(prepared)
    return converted


def litert(model: nn.Module, images: list[Tensor], folder: Path, bits: str) -> Ready:
    """LiteRT (TensorFlow Lite) with its XNNPACK delegate; int8 by AI Edge Quantizer, static."""
    import litert_torch
    from ai_edge_litert.interpreter import Interpreter

    path = folder / "model.tflite"
    litert_torch.convert(model, (images[0],)).export(str(path))
    if bits == "int8":
        from ai_edge_quantizer import quantizer, recipe

        work = quantizer.Quantizer(str(path), recipe.static_wi8_ai8())
        name = Interpreter(model_path=str(path)).get_signature_runner()
        (key,) = name.get_input_details()
        found = work.calibrate({"serving_default": [{key: image[None].numpy()} for batch in images for image in batch]})
        path = folder / "int8.tflite"
        work.quantize(found).export_model(str(path))

    def start() -> Session:
        interpreter = Interpreter(model_path=str(path), num_threads=1)
        interpreter.allocate_tensors()
        (given,), made = interpreter.get_input_details(), interpreter.get_output_details()[0]

        def run(x: Tensor) -> Tensor:  # an int8 file takes and gives whole numbers, whose scales it tells
            scale, zero = given["quantization"]
            whole = (x / scale + zero).round().clamp(-128, 127).to(torch.int8) if scale else x
            interpreter.set_tensor(given["index"], whole.numpy())
            interpreter.invoke()
            out, (scale, zero) = torch.from_numpy(interpreter.get_tensor(made["index"])), made["quantization"]
            return (out.float() - zero) * scale if scale else out

        return run

    return Ready(path.stat().st_size, start)


def coreml(model: nn.Module, images: list[Tensor], folder: Path, _: str) -> Ready:
    """Core ML as an ML program in float32; it runs on Apple's machines alone."""
    import coremltools as ct

    program = program_of(model, images[0]).run_decompositions({})
    made = ct.convert(
        program, compute_precision=ct.precision.FLOAT32, minimum_deployment_target=ct.target.iOS17, skip_model_load=True
    )
    path = folder / "model.mlpackage"
    made.save(str(path))
    return Ready(_bytes(*(file for file in path.rglob("*") if file.is_file())), None)


def compiled(model: nn.Module, images: list[Tensor], folder: Path, _: str) -> Ready:
    """`torch.compile`, for the one size."""

    def start() -> Session:
        torch.compiler.reset()
        return torch.compile(model, dynamic=False)

    return Ready(None, start)


def fused(model: nn.Module, images: list[Tensor], folder: Path, _: str) -> Ready:
    """Eager torch on `padfree.fuse`'s form of the network."""
    form = padfree.fuse(model, input_size=tuple(images[0].shape[1:]))

    def start() -> Session:
        return torch.inference_mode()(copy.deepcopy(form).forward)

    return Ready(None, start)


def _bytes(*files: Path) -> int:
    return sum(file.stat().st_size for file in files)


_FLOAT, _BOTH = ("fp32",), ("fp32", "int8")
RUNTIMES: dict[str, Runtime] = {
    "fused eager": Runtime((), _FLOAT, fused, "padfree's operators are float32"),
    "torch.compile": Runtime((), _FLOAT, compiled, "not tried"),
    "ONNX Runtime": Runtime(("onnx", "onnxscript", "onnxruntime"), _BOTH, onnxruntime),
    "OpenVINO": Runtime(("openvino", "onnx", "onnxscript", "onnxruntime"), _BOTH, openvino),
    "ncnn": Runtime(("ncnn", "pnnx"), _FLOAT, ncnn, "its quantization tools are not in its Python packages"),
    "ExecuTorch XNNPACK": Runtime(("executorch", "torchao"), _BOTH, executorch),
    "LiteRT": Runtime(("litert_torch", "ai_edge_litert", "ai_edge_quantizer"), _BOTH, litert),
    "Core ML": Runtime(("coremltools",), _FLOAT, coreml, "nothing of it runs here"),
}


def prepared(name: str, model: nn.Module, images: list[Tensor], folder: Path, bits: str) -> Ready:
    """The network, ready for that runtime; what goes wrong is raised as it is."""
    folder.mkdir(parents=True)
    found: Any = RUNTIMES[name].prepare(model, images, folder, bits)
    assert isinstance(found, Ready)
    return found
