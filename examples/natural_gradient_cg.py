"""One natural-gradient step on digits, in six ways: (F + damping)^-1 g.

    python examples/natural_gradient_cg.py

KFAC and EKFAC solve with an approximation of F, in closed form. All others solve with F itself,
which none of them forms: conjugate gradients, the same with KFAC as a preconditioner, the space of
samples (a Gram matrix of J's rows), and scipy's conjugate gradients. The residual is that of the
exact system; the loss is that of the batch behind the step, whose length minimises the damped
quadratic model (Martens and Grosse 2015, section 6.4): one where the system is solved exactly.
"""

import time
from collections.abc import Callable

import scipy.sparse.linalg
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import nngeo_lazy as ng

DAMPING = 0.03
EXAMPLES = 256

torch.manual_seed(0)
x, y = load_digits(return_X_y=True)
x, y = torch.tensor(x / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(y)
model = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1),  # (N, 8, 8, 8)
    nn.ReLU(),
    nn.Conv2d(8, 16, 3, stride=2),  # (N, 16, 3, 3)
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(144, 32),
    nn.ReLU(),
    nn.Linear(32, 10),
)

# a little training, so that there is a curvature to speak of
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(10):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()

batch = x[:EXAMPLES], y[:EXAMPLES]
model.zero_grad()
start = nn.functional.cross_entropy(model(batch[0]), batch[1])
start.backward()

F = ng.FIM(model, batch, "implicit")  # the exact Fisher information, by its products
w, g = F.space.values(model).detach(), F.space.grad(model)


def loss_after(step: Tensor) -> float:
    """The loss of the batch behind a step."""
    F.space.assign_(model, w - step)
    with torch.no_grad():
        loss = float(nn.functional.cross_entropy(model(batch[0]), batch[1]))
    F.space.assign_(model, w)
    return loss


def cg(preconditioner: object = None) -> tuple[Tensor, int]:
    found = ng.solve(F, g, damping=DAMPING, tol=1e-5, preconditioner=preconditioner)
    return found.x, found.iterations


def closed_form(representation: str) -> tuple[Tensor, int]:
    return ng.FIM(model, batch, representation).solve(g, damping=DAMPING), 0


def scipy_cg() -> tuple[Tensor, int]:
    steps: list[object] = []
    A = F.damped(DAMPING).to_scipy()
    solution, _ = scipy.sparse.linalg.cg(A, g.numpy(), rtol=1e-5, callback=steps.append)
    return torch.from_numpy(solution), len(steps)


WAYS: dict[str, Callable[[], tuple[Tensor, int]]] = {
    "KFAC": lambda: closed_form("kfac"),
    "EKFAC": lambda: closed_form("ekfac"),
    "CG": cg,
    "CG, KFAC preconditioner": lambda: cg(ng.FIM(model, batch, "kfac")),
    "CG, Nystrom preconditioner": lambda: cg(ng.nystrom(F, 100, seed=0)),
    "sample space": lambda: closed_form("factored"),  # rows: 9 directions for each example
    "scipy's CG": scipy_cg,
}

print(f"{len(g)} parameters, {EXAMPLES} examples, damping {DAMPING:g}, loss {start.item():.4f}")
print(f"{'':28}{'iterations':>12}{'seconds':>10}{'residual':>11}{'loss after':>12}")
for name, way in WAYS.items():
    begin = time.perf_counter()
    step, iterations = way()
    seconds = time.perf_counter() - begin
    along = F @ step + DAMPING * step
    residual = float((along - g).norm() / g.norm())
    step = step * (g @ step) / (step @ along)  # the length that the quadratic model wants
    print(f"{name:28}{iterations:12}{seconds:10.2f}{residual:11.1e}{loss_after(step):12.4f}")
