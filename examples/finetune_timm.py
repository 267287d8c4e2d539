"""Fine-tune a converted timm model in a training loop of one's own.

python examples/finetune_timm.py

The loop knows nothing of padfree. Convert after the pretrained weights are in: what was learnt keeps
its keys and values, and only the layers that are new (the stem's tail) start from their initial values.
"""

import tempfile
from pathlib import Path

import timm
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy, interpolate

import padfree

torch.manual_seed(0)

# real handwritten digits, 8x8 grey, as 32x32 images of three channels: 480 to train on, 240 to test with
pixels, classes = load_digits(return_X_y=True)
images = torch.tensor(pixels[:720], dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
images = interpolate(images.expand(-1, 3, 8, 8), size=32, mode="bilinear")
labels = torch.tensor(classes[:720])
(train_images, test_images), (train_labels, test_labels) = images.split((480, 240)), labels.split((480, 240))

# pretrained=True where the weights may be downloaded
original = timm.create_model("test_efficientnet", pretrained=False, num_classes=10)
model = padfree.convert(original, input_size=(3, 32, 32))

# the new layers may learn faster than those that only have to adapt
known = original.state_dict().keys()
new = [parameter for key, parameter in model.named_parameters() if key not in known]
old = [parameter for key, parameter in model.named_parameters() if key in known]
optimizer = torch.optim.AdamW([{"params": new, "lr": 6e-3}, {"params": old, "lr": 3e-3}])
print(f"{len(old)} parameters kept, {len(new)} new")

losses = []
for epoch in range(5):
    model.train()
    for batch in torch.randperm(len(train_images)).split(32):
        loss = cross_entropy(model(train_images[batch]), train_labels[batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        right = (model(test_images).argmax(1) == test_labels).float().mean().item()
    print(f"epoch {epoch + 1}: last loss {losses[-1]:.3f}, test accuracy {100 * right:.1f} %")
assert losses[-1] < losses[0]

# the trained network goes into one file that rebuilds it
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "digits.safetensors"
    padfree.save(model, path)
    again = padfree.load(path)
    with torch.no_grad():
        torch.testing.assert_close(again(test_images[:8]), model(test_images[:8]))
print("saved and loaded: equal logits")
