"""A padding-free network in int8 for a phone: PT2E quantization, ExecuTorch with XNNPACK, run on this machine's CPU.

pip install executorch
python examples/int8_pt2e.py
"""

import sys

try:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
except ImportError as error:
    print(f"left out: {error.name} is not installed")
    sys.exit()

import timm
import torch

import padfree

torch.manual_seed(0)
SIZE = (3, 96, 96)
# any name will do; weights are random here, so pass pretrained=True, or fine-tune, before it is quantized in earnest
model = padfree.convert(timm.create_model("mobilenetv3_small_050", num_classes=10), input_size=SIZE).eval()
images = torch.randn(16, *SIZE)  # some hundred of your own, normalised as the network takes them

# the graph, with operators that watch the range of every map while images go through
graph = torch.export.export(model, (images[:1],)).module()
watched = prepare_pt2e(graph, XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True)))
with torch.no_grad():
    for image in images.split(1):
        watched(image)

# quantize and dequantize operators in their place; a backend fuses them with what lies between
quantized = convert_pt2e(watched)
program = to_edge_transform_and_lower(
    torch.export.export(quantized, (images[:1],)), partitioner=[XnnpackPartitioner()]
).to_executorch()
content = bytes(program.buffer)  # write these to a file: it is what the phone gets

method = Runtime.get().load_program(content).load_method("forward")
with torch.no_grad():
    expected = torch.cat([model(image) for image in images.split(1)])
found = torch.cat([method.execute([image])[0].clone() for image in images.split(1)])
decibels = 10 * torch.log10(expected.square().sum() / (expected - found).square().sum())
print(f"{len(content) / 1e6:.2f} MB, outputs {decibels:.1f} dB from float32's")
assert decibels > 10
