"""What each representation keeps of one Fisher information matrix, and what that costs.

Trains a small network on breast-cancer data, builds the exact matrix and every representation of
it, prints one table and draws the matrices side by side. Runs in seconds.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.colors import SymLogNorm
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.nn import functional as F

import nngeo_lazy as ng
from nngeo_lazy.representations import LowRank, Mixed

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

# --- a trained network ----------------------------------------------------------------------------

data = load_breast_cancer()
x = torch.tensor(data.data)[:, :6]  # (569, 6): the first features
x = (x - x.mean(0)) / x.std(0)
y = torch.tensor(data.target)  # (569,)
model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(150):
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()

# --- every representation -------------------------------------------------------------------------

REPRESENTATIONS = {
    "dense": "dense",
    "block_diagonal": "block_diagonal",
    "ekfac": "ekfac",
    "kfac": "kfac",
    "quasi_diagonal": "quasi_diagonal",
    "diagonal": "diagonal",
    "low_rank (rank 5)": LowRank(rank=5),
    "Mixed: last layer dense": Mixed("diagonal", {"4": "dense"}),
}
built = {name: ng.FIM(model, (x, y), each) for name, each in REPRESENTATIONS.items()}
exact = built["dense"].to_dense()
step = torch.linalg.solve(exact + 1e-3 * torch.eye(len(exact)), torch.ones(len(exact)))

print(f"{'':24}{'numbers kept':>13}{'|F - exact|':>13}{'trace':>9}{'|step - exact|':>16}")
errors = {}
for name, fim in built.items():
    errors[name] = float((fim.to_dense() - exact).norm() / exact.norm())
    off = (fim.solve(torch.ones(len(exact)), damping=1e-3) - step).norm() / step.norm()
    kept = fim.report().bytes // 8
    print(f"{name:24}{kept:13,}{errors[name]:13.1%}{float(fim.trace()):9.3f}{float(off):16.1%}")

# --- the matrices side by side --------------------------------------------------------------------

figure, axes = plt.subplots(2, 4, figsize=(13, 7.2), layout="constrained")
limit = float(exact.abs().max())
norm = SymLogNorm(1e-3 * limit, vmin=-limit, vmax=limit)
edges = [s.stop - 0.5 for name, s in built["dense"].space.slices.items() if name.endswith("bias")]
for ax, (name, fim) in zip(axes.flat, built.items(), strict=True):
    image = ax.imshow(fim.to_dense(), norm=norm, cmap="RdBu_r", interpolation="none")
    ax.set_title(name if name == "dense" else f"{name}: {errors[name]:.0%} off", fontsize=11)
    for edge in edges[:-1]:
        ax.axhline(edge, color="0.6", linewidth=0.5)
        ax.axvline(edge, color="0.6", linewidth=0.5)
    ax.set_xticks([])
    ax.set_yticks([])
figure.colorbar(image, ax=axes, shrink=0.7, label="entry (symmetric logarithm)")
figure.suptitle("The Fisher of one network (6-5-4-2, breast cancer); lines between layers")
where = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("representations.png"))
figure.savefig(where, dpi=110)
print(f"\nwrote {where}")
