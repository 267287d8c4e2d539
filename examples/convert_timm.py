"""Convert a timm model, see what changed, and keep it in a file that rebuilds it.

python examples/convert_timm.py
"""

import tempfile
from pathlib import Path

import timm
import torch

import padfree

# any name of timm.list_models() will do: it converts, or padfree says why not
original = timm.create_model("mobilenetv3_small_050", num_classes=10)

# what would be done, before anything is
plan = padfree.plan(original, input_size=(3, 96, 96))
print(plan)

# the original stays as it is; the converted copy has its class, its weights under its keys, and some new ones
converted = plan.apply(original)
assert isinstance(converted, type(original))
assert [key for key in converted.state_dict() if key in original.state_dict()] == list(original.state_dict())
print(padfree.compare(original, converted, input_size=(3, 96, 96)))

# it trains like any other model
loss = converted(torch.rand(2, 3, 96, 96)).square().mean()
loss.backward()

# weights, source and plan in one safetensors file
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "padding_free.safetensors"
    padfree.save(converted, path)
    again = padfree.load(path)

x = torch.rand(1, 3, 96, 96)
torch.testing.assert_close(again(x), converted.eval()(x))
print("loaded from a file: equal outputs")
