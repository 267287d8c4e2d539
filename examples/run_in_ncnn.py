"""A converted network as ncnn files, run on this machine's CPU and compared with PyTorch.

pip install ncnn pnnx
python examples/run_in_ncnn.py network.safetensors folder/      # a file of padfree-convert --output
"""

import sys

try:
    import ncnn
    import pnnx
except ImportError as error:
    print(f"left out: {error.name} is not installed")
    sys.exit()

import subprocess
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
size = model.padfree_plan.input_size
image = torch.randn(1, *size)  # yours, normalised as the network takes it

# ncnn's converter reads TorchScript; it folds the norms and writes network.ncnn.param (a text) and network.ncnn.bin
with torch.no_grad():
    expected = model(image)
    torch.jit.trace(model, image).save(folder / "network.pt")
shape = f"inputshape=[1,{','.join(map(str, size))}]"
subprocess.run([pnnx.EXEC_PATH, "network.pt", shape, "fp16=0"], cwd=folder, check=True, stdout=subprocess.DEVNULL)

# the same calls as in an app's C++
net = ncnn.Net()
net.load_param(str(folder / "network.ncnn.param"))
net.load_model(str(folder / "network.ncnn.bin"))
extractor = net.create_extractor()
extractor.input("in0", ncnn.Mat(image[0].numpy()))
status, out = extractor.extract("out0")
assert status == 0, f"ncnn does not run it (status {status})"

found = torch.tensor(out.numpy()).reshape(expected.shape)
difference = float((found - expected).abs().max() / expected.abs().max())
written = (folder / "network.ncnn.bin").stat().st_size
print(f"ncnn {ncnn.__version__}: {written / 1e6:.1f} MB, largest difference {difference:.1e} of the largest output")
assert difference < 2e-2  # ncnn computes in float16 where the processor has it
