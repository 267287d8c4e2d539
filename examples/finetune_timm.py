"""Convert a trained timm model, calibrate it, and fine-tune it in a training loop of one's own.

python examples/finetune_timm.py

Three lines are padfree's: convert once the trained weights are in, calibrate on unlabelled images, and fine-tune at a
lower rate than the one that the network was trained with. The loop knows nothing of padfree.
"""

import copy
import tempfile
from pathlib import Path

import timm
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, interpolate

import padfree

torch.manual_seed(0)

# real handwritten digits, 8x8 grey, as 32x32 images of three channels: 480 to train on, 240 to test with
pixels, classes = load_digits(return_X_y=True)
images = torch.tensor(pixels[:720], dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
images = interpolate(images.expand(-1, 3, 8, 8), size=32, mode="bilinear")
labels = torch.tensor(classes[:720])
(train_images, test_images), (train_labels, test_labels) = images.split((480, 240)), labels.split((480, 240))


def train(model: nn.Module, epochs: int, rate: float) -> None:
    """Adam on shuffled batches of 32; the rate rises over the first steps and falls to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * 15)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(train_images)).split(32):
            cross_entropy(model(train_images[batch]), train_labels[batch]).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Percent of the test images that are recognised."""
    return 100 * (model(test_images).argmax(1) == test_labels).float().mean().item()


# stands for pretrained=True, where weights may be downloaded
original = timm.create_model("test_efficientnet", num_classes=10)
train(original, epochs=6, rate=6e-3)

# On 32 pixels this network's last map has 2x2 points and would lose three of the four, which a trained network misses:
# that place is left as it is. print(padfree.plan(original, input_size=(3, 32, 32))) shows all places.
places = {"input_size": (3, 32, 32), "exclude": ["blocks.3.*"]}

# the paper's initial values are for networks that are trained from scratch: a trained one is lost with them
fresh = padfree.convert(original, init="fresh", **places).eval()

model = padfree.convert(original, init="preserve", **places).eval()
preserved = accuracy(model)
print(padfree.calibrate(model, train_images.split(60), original=original, progress=False))
calibrated = copy.deepcopy(model)
train(model, epochs=4, rate=2e-3)  # a third of the rate above; for a single epoch a tenth

print(f"original {accuracy(original):.1f} %, converted with fresh layers {accuracy(fresh):.1f} %")
print(f"preserved {preserved:.1f} %, calibrated {accuracy(calibrated):.1f} %, fine-tuned {accuracy(model):.1f} %")
assert accuracy(model) > accuracy(fresh)

# the trained network goes into one file that rebuilds it
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "digits.safetensors"
    padfree.save(model, path)
    again = padfree.load(path)
    with torch.no_grad():
        torch.testing.assert_close(again(test_images[:8]), model(test_images[:8]))
print("saved and loaded: equal logits")
