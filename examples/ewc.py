"""Elastic weight consolidation: digits in a sequence of tasks.

    python examples/ewc.py [--save FOLDER] [--seeds N]

A network learns to tell 0 from 1, then 2 from 3, up to 8 from 9, each task with a head of its own
and without the earlier images. Its other layers are held by the Fisher of each earlier task: none,
diagonal or KFAC. Each way has the best of a grid of strengths, chosen on seeds of its own; printed
are accuracies over all tasks at the end and forgetting, the mean loss of accuracy since a task was
learned. Saves a figure.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import nngeo_lazy as ng

STRENGTHS = [10.0, 100.0, 1e3, 1e4, 1e5]
WAYS = {"none": [0.0], "diagonal": STRENGTHS, "kfac": STRENGTHS}
STEPS, BATCH = 150, 32


def tasks():
    """For each pair of digits its training and test images, labels 0 and 1."""
    x, y = map(torch.from_numpy, load_digits(return_X_y=True))
    x, made = x.float() / 16, []
    for first in range(0, 10, 2):
        index = torch.nonzero((y == first) | (y == first + 1)).squeeze(1)
        index = index[torch.randperm(len(index))]
        cut = 2 * len(index) // 3
        made.append([(x[part], y[part] - first) for part in (index[:cut], index[cut:])])
    return made


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(20, 2) for _ in range(5))
        self.task = 0

    def forward(self, x):
        return self.heads[self.task](self.body(x))


def run(way, strength, seed):
    """Accuracy (after task i, of task j)."""
    torch.manual_seed(seed)
    data = tasks()
    model, anchors, table = Network(), [], torch.full((5, 5), torch.nan)
    for task, ((x, y), _) in enumerate(data):
        model.task = task
        learned = [*model.body.parameters(), *model.heads[task].parameters()]
        optimizer = torch.optim.Adam(learned, lr=3e-3)
        for _ in range(STEPS):
            index = torch.randint(len(x), (BATCH,))
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[index]), y[index])
            if anchors:
                loss = loss + ng.ewc_penalty(model, anchors, strength=strength)
            loss.backward()
            optimizer.step()
        if way != "none":
            fisher = ng.FIM(model, (x, y), way, params="body")
            anchors.append((fisher, fisher.space.values(model).detach().clone()))
        for model.task, (_, (images, labels)) in enumerate(data[: task + 1]):
            table[task, model.task] = (model(images).argmax(1) == labels).float().mean()
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--save", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    print(f"{'':<10}{'strength':>10}{'accuracy at the end':>22}{'forgetting':>20}")
    for way, grid in WAYS.items():
        tuned = {s: sum(run(way, s, 100 + k)[-1].mean() for k in range(2)) for s in grid}
        best = max(tuned, key=tuned.get)
        found = torch.stack([run(way, best, seed) for seed in range(options.seeds)])
        end = found[:, -1].mean(1)
        lost = (found.diagonal(dim1=1, dim2=2) - found[:, -1])[:, :-1].mean(1)
        numbers = [f"{float(v.mean()):.3f} +- {float(v.std()):.3f}" for v in (end, lost)]
        print(f"{way:<10}{best:>10g}{numbers[0]:>22}{numbers[1]:>20}")
        axes[0].plot(range(1, 6), found.nanmean((0, 2)), marker="o", label=way)
        axes[1].bar(way, float(lost.mean()), yerr=float(lost.std()), capsize=4)
    axes[0].set(xlabel="tasks learned", ylabel="mean accuracy on them", xticks=range(1, 6))
    axes[0].legend()
    axes[0].grid(alpha=0.3)
    axes[1].set(ylabel="forgetting", title=f"{options.seeds} seeds, mean and standard deviation")
    figure.savefig(options.save / "ewc.png", dpi=120)
    print(f"saved {options.save / 'ewc.png'}")
