"""Every representation of one Fisher information matrix, on a small CNN trained on real images.

Trains on scikit-learn's digits, builds each representation from the training data, prints one
table, and draws the matrices side by side. Runs in well under a minute on two cores.
"""

import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import LogNorm
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import nngeo_lazy as ng

torch.manual_seed(0)
NAMES = ["dense", "block_diagonal", "ekfac", "kfac", "diagonal"]
DAMPING = 1e-3

# --- a trained network and a loader ---------------------------------------------------------------

images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
images = images.float().view(-1, 1, 8, 8) / 16
order = torch.randperm(len(images))
train, test = order[:1500], order[1500:]
loader = DataLoader(TensorDataset(images[train], labels[train]), batch_size=250)

model = nn.Sequential(
    nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(),  # (N, 6, 8, 8)
    nn.Conv2d(6, 12, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2),  # (N, 12, 2, 2)
    nn.Flatten(), nn.Linear(48, 10),
)  # fmt: skip
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(15):
    for x, y in DataLoader(loader.dataset, batch_size=50, shuffle=True):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean()
print(f"A small CNN on digits: {accuracy:.1%} of {len(test)} test images right\n")

# --- a second task moves the weights: what elastic weight consolidation has to measure ------------

space = ng.ParamSpace.of(model)
w_a = space.values(model).detach()
before = model(images[train]).log_softmax(1).detach()
for _ in range(5):
    model.zero_grad()
    F.cross_entropy(model(images[test].rot90(1, (2, 3))), labels[test]).backward()
    space.add_(model, space.grad(model), alpha=-0.01)
w = space.values(model).detach()
after = model(images[train]).log_softmax(1).detach()
divergence = (before.exp() * (before - after)).sum(1).mean()  # KL between the predictions
space.assign_(model, w_a)

# --- every representation, the same calls ---------------------------------------------------------

model.zero_grad()
F.cross_entropy(model(images[train]), labels[train]).backward()
grad = space.grad(model)
matrices = {}
print(f"{'':18} {'seconds':>7} {'bytes':>10} {'error':>8} {'trace':>7} {'residual':>10}  penalty")
for name in NAMES:
    start = time.perf_counter()
    fisher = ng.FIM(model, loader, name, likelihood="categorical")
    seconds = time.perf_counter() - start
    matrices[name] = fisher.to_dense()
    error = (matrices[name] - matrices["dense"]).norm() / matrices["dense"].norm()
    step = fisher.solve(grad, damping=DAMPING)
    residual = (matrices[name] @ step + DAMPING * step - grad).norm() / grad.norm()
    size = sum(t.numel() * t.element_size() for t in fisher.representation())
    penalty = fisher.vTMv(w - w_a) / 2
    print(f"{name:18s} {seconds:7.2f} {size:10,d} {error:8.3f} {fisher.trace():7.3f} ", end="")
    print(f"{residual:10.1e} {penalty:12.5f}")
print(f"\nKL divergence between the predictions at w_a and w: {divergence:.5f}")

print("\nWhat KFAC holds:")
print(ng.FIM(model, loader, "kfac", likelihood="categorical").report())

# --- the matrices side by side --------------------------------------------------------------------

CELL = 5  # parameters a pixel, which shows the largest of its entries
figure, axes = plt.subplots(1, len(NAMES), figsize=(3.2 * len(NAMES), 3.7), layout="constrained")
top = matrices["dense"].abs().max().item()
starts = {name: space.slices[f"{name}.weight"].start / CELL for name in ("0", "2", "6")}
for axis, name in zip(axes, NAMES, strict=True):
    values = F.max_pool2d(matrices[name].abs()[None], CELL, ceil_mode=True)[0]
    picture = axis.imshow(values.clamp_min(1e-6 * top), norm=LogNorm(1e-6 * top, top), cmap="magma")
    axis.set_title(name)
    axis.set_xticks(list(starts.values()), list(starts))
    axis.set_yticks(list(starts.values()), list(starts) if name == NAMES[0] else [])
    axis.set_xlabel("layer")
axes[0].set_ylabel("layer")
figure.colorbar(picture, ax=axes, shrink=0.8, label="absolute value")
figure.savefig(Path(__file__).with_name("quickstart.png"), dpi=110)
