"""The pictures and the table of the page "Which one do I take?".

    python docs/figures/choose.py

A small convolutional network on digits. Every representation of its Fisher is built, compared with
the exact matrix, and timed as a multiple of one gradient over the same data: the better of two.
"""

import time
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import nngeo_lazy as ng
from nngeo_lazy.representations import LowRank

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent.parent
DAMPING = 1e-3
FORMS = {
    '"diagonal"': "diagonal",
    '"quasi_diagonal"': "quasi_diagonal",
    '"kfac"': "kfac",
    '"ekfac"': "ekfac",
    "LowRank(rank=50)": LowRank(rank=50),
    '"block_diagonal"': "block_diagonal",
    '"dense"': "dense",
    '"implicit"': "implicit",
}


def trained():
    """A network, its images and its labels."""
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float64)[:600, None] / 16  # (N, 1, 8, 8)
    y = torch.tensor(digits.target[:600])
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32, 10),
    ).double()  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(25):
        for index in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
    return model, x, y


def best(work, rounds=2):
    """The result, and the shortest time of the processor, which other work does not change."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        result = work()
        times.append(time.process_time() - start)
    return result, min(times)


def gradient(model, batches):
    model.zero_grad()
    for x, y in batches:
        F.cross_entropy(model(x), y, reduction="sum").backward()


def measured():
    """A row for each representation: name, error, gain of a step, times, numbers kept."""
    model, x, y = trained()
    batches = list(zip(x.split(100), y.split(100), strict=True))
    _, unit = best(lambda: gradient(model, batches))
    exact = ng.FIM(model, batches, "dense")
    matrix = exact.to_dense()
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    g = exact.space.grad(model)
    most = g @ exact.solve(g, damping=DAMPING)
    rows = []
    for name, form in FORMS.items():
        fisher, seconds = best(lambda form=form: ng.FIM(model, batches, form))
        step, solving = best(lambda fisher=fisher: fisher.solve(g, damping=DAMPING), 1)
        lazy = form == "implicit"
        off = 0.0 if lazy else float((fisher.to_dense() - matrix).norm() / matrix.norm())
        along = matrix @ step + DAMPING * step
        gain = float((g @ step) ** 2 / (step @ along) / most)  # with the best length
        kept = len(g) if lazy else fisher.report().bytes // 8
        rows.append((name, off, gain, seconds / unit, solving / unit, kept))
    return rows


def table(rows):
    lines = [
        "| representation | error | gain of a step | build time | first solve | numbers kept |"
    ]
    lines.append("|---|---|---|---|---|---|")
    for name, off, gain, build, solve, kept in rows:
        cells = f"`{name}`", f"{off:.0%}", f"{gain:.0%}", f"{build:.0f}", f"{solve:.1f}"
        lines.append(f"| {' | '.join(cells)} | {kept:,} |")
    page = HERE / "choose.md"
    text = page.read_text(encoding="utf-8")
    start, rest = text.split("<!-- measured -->\n\n")
    end = rest.split("\n<!-- to here -->\n")[1]
    made = "\n".join(lines)
    marks = f"<!-- measured -->\n\n{made}\n\n<!-- to here -->\n"
    page.write_text(f"{start}{marks}{end}", encoding="utf-8")
    print(made)


def scatter(rows):
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for marker, (name, _, gain, build, solve, kept) in zip("osD^v<>P", rows, strict=True):
        for ax, value in zip(axes, (build + solve, kept), strict=True):
            ax.plot(value, gain, marker, markersize=9, label=name.strip('"'))
    axes[0].set(xscale="log", ylim=(0, 1.05), xlabel="build and one solve, in gradients")
    axes[0].set_ylabel("share of the best possible gain")
    axes[1].set(xscale="log", xlabel="numbers kept")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.margins(x=0.15)
    figure.savefig(HERE / "choose_measured.png", dpi=110)


QUESTION = {"boxstyle": "round,pad=0.5", "facecolor": "#e8eaf6", "edgecolor": "#3f51b5"}
ANSWER = {"boxstyle": "square,pad=0.5", "facecolor": "#e8f5e9", "edgecolor": "#2e7d32"}


def tree():
    """Draw the decision tree."""
    figure, ax = plt.subplots(figsize=(10, 5.2), layout="constrained")
    nodes = {
        "exact": (50, 92, "Must it be exact?", QUESTION),
        "small": (22, 66, "Up to 10,000\nparameters?", QUESTION),
        "memory": (77, 66, "Can you keep more than\none number a parameter?", QUESTION),
        "dense": (8, 34, "dense", ANSWER),
        "solve": (34, 38, "Few examples, or\na small batch?", QUESTION),
        "factored": (24, 8, "factored\nor low_rank", ANSWER),
        "implicit": (45, 8, "implicit", ANSWER),
        "second": (70, 38, "Is there time for\na second pass?", QUESTION),
        "diagonal": (93, 34, "diagonal or\nquasi_diagonal", ANSWER),
        "ekfac": (64, 8, "ekfac", ANSWER),
        "kfac": (79, 8, "kfac", ANSWER),
    }
    edges = [
        ("exact", "small", "yes"), ("exact", "memory", "no"), ("small", "dense", "yes"),
        ("small", "solve", "no"), ("solve", "factored", "yes"), ("solve", "implicit", "no"),
        ("memory", "second", "yes"), ("memory", "diagonal", "no"), ("second", "ekfac", "yes"),
        ("second", "kfac", "no"),
    ]  # fmt: skip
    for a, b, label in edges:
        (xa, ya, *_), (xb, yb, *_) = nodes[a], nodes[b]
        ax.plot([xa, xb], [ya, yb], color="0.6", zorder=0)
        ax.text((xa + xb) / 2, (ya + yb) / 2, label, ha="center", backgroundcolor="white")
    for x, y, text, box in nodes.values():
        ax.text(x, y, text, ha="center", va="center", bbox=box, fontsize=12)
    ax.set(xlim=(0, 101), ylim=(0, 100))
    ax.axis("off")
    figure.savefig(HERE / "choose.png", dpi=110)


if __name__ == "__main__":
    torch.set_num_threads(1)
    tree()
    rows = measured()
    table(rows)
    scatter(rows)
