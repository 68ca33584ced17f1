"""Tiny float32 networks under every optimizer: no exception of rounding, no NaN, no divergence.

    python -m tests.fuzz.training 1000

Each run draws a network, data that may be badly scaled or singular, a likelihood, a representation
and an estimator, and trains 30 steps on defaults. A divergence is a last
loss of a tenth above the first one.
"""

import collections
import math
import sys
import warnings

import torch
from torch import nn
from torch.nn import functional

import nngeo_lazy as ng

REPRESENTATIONS = [
    *("kfac", "ekfac", "diagonal", "quasi_diagonal", "block_diagonal", "dense"),
    *("kernel", "implicit"),
]
ESTIMATORS = ["mc", "empirical", "exact"]
LOSSES = ["categorical", "bernoulli", "gaussian", "poisson", "huber"]
STEPS = 30


def network(pick, inputs, outputs):
    """A few layers of a kind, for inputs (N, inputs)."""
    width = pick(1, 2, 5, 16)
    act = pick(nn.ReLU, nn.Tanh, nn.GELU, nn.Sigmoid)
    norm = pick(nn.Identity, nn.LayerNorm, nn.BatchNorm1d)
    bias = pick(True, False)
    body = [nn.Linear(inputs, width, bias=bias), norm(width), act()]
    for _ in range(pick(0, 0, 1, 2)):
        body += [nn.Linear(width, width, bias=bias), act()]
    if pick(True, False, False):
        body = [
            nn.Unflatten(1, (1, inputs)),
            nn.Conv1d(1, width, 3, pick(1, 2), 1),
            *(act(), nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(2 * width, width)),
        ]
    if pick(True, False, False, False):
        body += [nn.Dropout(0.3)]
    return nn.Sequential(*body, nn.Linear(width, outputs, bias=bias))


def data(pick, n, inputs):
    """Inputs (n, inputs), plain or with much that is zero, equal, constant or of another size."""
    x = torch.randn(n, inputs)
    change = pick("plain", "zeros", "equal", "constant", "sizes", "large", "small")
    if change == "zeros":
        x = x.relu() * (torch.rand(inputs) < 0.5)
    elif change == "equal":
        x = x[:, :1].expand(n, inputs).clone()
    elif change == "constant":
        x = x[:1].expand(n, inputs).clone()
    elif change == "sizes":
        x = x * torch.logspace(-3, 3, inputs)
    return x * {"large": 1e2, "small": 1e-4}.get(change, 1.0)


def loss_of(kind, n, outputs):
    """A loss of outputs (n, outputs), with labels that are drawn now."""
    labels, binary = torch.randint(outputs, (n,)), torch.randint(2, (n, outputs)).float()
    counts, numbers = torch.randint(5, (n, outputs)).float(), torch.randn(n, outputs)
    return {
        "categorical": lambda f: functional.cross_entropy(f, labels),
        "bernoulli": lambda f: functional.binary_cross_entropy_with_logits(f, binary),
        "gaussian": lambda f: functional.mse_loss(f, numbers),
        "poisson": lambda f: functional.poisson_nll_loss(f, counts, full=True) + 1,
        "huber": lambda f: functional.huber_loss(f, numbers),
    }[kind]


def drawn(seed):
    """A network, inputs, a loss and an optimizer, and what they are in words."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*options):
        return options[int(torch.randint(len(options), (), generator=generator))]

    torch.manual_seed(seed)
    n, inputs, kind = pick(1, 2, 8, 32), pick(1, 3, 6), pick(*LOSSES)
    outputs = pick(2, 3, 10)
    representation, estimator = pick(*REPRESENTATIONS), pick(*ESTIMATORS)
    given = {"categorical": None, "bernoulli": "bernoulli", "gaussian": nn.MSELoss()}
    likelihood = {**given, "poisson": "poisson", "huber": None}[kind]
    if likelihood is None and (kind == "huber" or representation == "implicit"):
        estimator = "empirical"
    if representation == "implicit":  # which is exact, and needs a likelihood
        kind, likelihood = ("gaussian", nn.MSELoss()) if kind == "huber" else (kind, likelihood)
        likelihood = likelihood or "categorical"
        estimator = "mc"
    moments = representation in ("kfac", "ekfac", "diagonal") and pick(True, False, False)
    model = network(pick, inputs, outputs)
    if n <= 2:
        model.eval()  # batch statistics of one example are none, and of two they are signs
    x, loss = data(pick, n, inputs), loss_of(kind, n, outputs)
    if kind == "poisson":  # whose rates are exponentials
        x = x.clamp(-5, 5)
    optimizer = ng.optim.NaturalGradient(
        model, representation, likelihood, estimator=estimator, second_moments=moments, seed=seed
    )
    words = f"{representation} {estimator} {kind} n={n} moments={moments} {model}"
    return model, x, loss, optimizer, words


def outcome(seed):
    """How a run ended, and what it was."""
    model, x, loss, optimizer, words = drawn(seed)

    def now():
        """The mean of 30 draws of dropout, the same ones each time."""
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            return sum(loss(model(x)).item() for _ in range(30)) / 30

    try:
        first = now()
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss(model(x)).backward()
            optimizer.step()
        last = now()
    except Exception as error:  # noqa: BLE001 - what is looked for
        return f"{type(error).__name__}: {str(error)[:200]}", words
    if not math.isfinite(last) or not all(bool(p.isfinite().all()) for p in model.parameters()):
        return "not finite", words
    return ("diverged" if last > first + 0.1 * abs(first) else "fine"), f"{first} {last} {words}"


def main():
    torch.set_num_threads(1)
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    seen = collections.Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ng.errors.LikelihoodWarning)
        for seed in range(first, first + int(sys.argv[1])):
            found, words = outcome(seed)
            seen[found] += 1
            if found != "fine":
                print(f"{seed}: {found}: {words}", flush=True)
    print(dict(seen))


if __name__ == "__main__":
    main()
