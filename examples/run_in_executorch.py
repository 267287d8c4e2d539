"""A converted network as an ExecuTorch program with XNNPACK, run on this machine's CPU and compared with PyTorch.

pip install executorch
python examples/run_in_executorch.py network.safetensors folder/      # a file of padfree-convert --output
"""

import sys

try:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime
except ImportError as error:
    print(f"left out: {error.name} is not installed")
    sys.exit()

import tempfile
from pathlib import Path

import timm
import torch

import padfree

torch.manual_seed(0)
if len(sys.argv) == 3:
    model, folder = padfree.load(sys.argv[1]), Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
else:
    model = padfree.convert(timm.create_model("mobilenetv3_small_050"), input_size=(3, 96, 96)).eval()
    temporary = tempfile.TemporaryDirectory()
    folder = Path(temporary.name)
image = torch.randn(1, *model.padfree_plan.input_size)  # yours, normalised as the network takes it

with torch.no_grad():
    expected = model(image)
    program = torch.export.export(model, (image,))
lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
file = folder / "network.pte"
file.write_bytes(lowered.buffer)

found = Runtime.get().load_program(file).load_method("forward").execute([image])[0]
difference = float((found - expected).abs().max() / expected.abs().max())
written = file.stat().st_size
print(f"ExecuTorch: {written / 1e6:.1f} MB, largest difference {difference:.1e} of the largest output")
assert difference < 1e-3
