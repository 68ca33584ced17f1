"""Cross-checks against nngeometry in float32, only in what it does correctly.

That is: linear layers without a sequence dimension and ungrouped convolutions padded with zeros,
all with a bias. What is compared with the peer is also compared, on the peer's side, with a Fisher
matrix written with torch.func alone, so that a disagreement says who is wrong.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

import nngeo_lazy as ng

pytestmark = pytest.mark.peers
metrics = pytest.importorskip("nngeometry.metrics")
pspace = pytest.importorskip("nngeometry.object.pspace")

TOLERANCE = 1e-5  # relative to the norm, float32


@dataclass
class Case:
    model: nn.Module
    x: Tensor
    y: Tensor

    def peer(self, representation):
        return metrics.FIM(self.model, (self.x.clone(), self.y), representation)

    def ours(self, representation):
        data = (self.x, self.y)
        return ng.FIM(self.model, data, representation, likelihood="categorical")

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The modules that own parameters, in parameter order."""
        modules = self.model.named_modules()
        return {name: module for name, module in modules if hasattr(module, "weight")}


def mlp() -> Case:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 4))
    return Case(model, torch.randn(50, 6), torch.randint(4, (50,)))


def cnn() -> Case:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 5, (3, 2), stride=2, padding=(0, 1), dilation=(1, 2)),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(45, 3),
    )
    return Case(model, torch.randn(60, 2, 7, 6), torch.randint(3, (60,)))


@pytest.fixture(params=[mlp, cnn])
def case(request) -> Case:
    torch.manual_seed(1)
    return request.param()


def dense_fisher(case: Case) -> Tensor:
    """The mean over examples of J^T (diag p - p p^T) J, (P, P) in float64."""
    params = {name: p.detach().double() for name, p in case.model.named_parameters()}

    def logits(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(case.model, params, (x.unsqueeze(0),)).squeeze(0)

    x = case.x.double()
    jacobian = vmap(jacrev(logits), (None, 0))(params, x)
    J = torch.cat([rows.flatten(2) for rows in jacobian.values()], -1)  # (N, C, P)
    p = vmap(logits, (None, 0))(params, x).softmax(-1)  # (N, C)
    H = p.diag_embed() - p.unsqueeze(-1) * p.unsqueeze(-2)  # (N, C, C)
    return torch.einsum("ncp,ncd,ndq->pq", J, H, J) / len(x)


def block_slices(case: Case) -> dict[str, slice]:
    slices, start = {}, 0
    for name, module in case.layers.items():
        size = sum(p.numel() for p in module.parameters())
        slices[name] = slice(start, start + size)
        start += size
    return slices


def flat_order(module: nn.Module) -> Tensor:
    """Where each flat parameter (weight row-major, then bias) lies in the joint (out, in + 1)."""
    out = module.weight.shape[0]
    joint = torch.arange(module.weight.numel() + out).view(out, -1)
    return torch.cat([joint[:, :-1].flatten(), joint[:, -1]])


def kfac_block(module: nn.Module, a: Tensor, g: Tensor) -> Tensor:
    order = flat_order(module)
    return torch.kron(g.contiguous(), a.contiguous())[order][:, order]


def eigenbasis(module: nn.Module, a: Tensor, g: Tensor) -> Tensor:
    return torch.kron(g.contiguous(), a.contiguous())[flat_order(module)]


def ekfac_block(module: nn.Module, a: Tensor, g: Tensor, diagonal: Tensor) -> Tensor:
    """From the eigenvectors of the factors, and the second moments in their basis."""
    basis = eigenbasis(module, a, g)
    return basis * diagonal @ basis.mT


def assert_close(actual: Tensor, expected: Tensor) -> None:
    error = torch.linalg.vector_norm(actual - expected) / torch.linalg.vector_norm(expected)
    assert error < TOLERANCE, f"relative error {error:.1e}"


def layer_moments(case: Case, module: nn.Module) -> tuple[Tensor, Tensor]:
    """Inputs with a one appended (N, T, in + 1), and the logits' gradients (N, T, C, out)."""
    seen = {}

    def record(module, args, output):
        seen["x"], seen["y"] = args[0], output

    handle = module.register_forward_hook(record)
    logits = case.model(case.x)
    handle.remove()
    g = [
        torch.autograd.grad(out.sum(), seen["y"], retain_graph=True)[0] for out in logits.unbind(-1)
    ]
    x, g = seen["x"].detach(), torch.stack(g, 1)  # (N, C, out, ...)
    if isinstance(module, nn.Conv2d):
        shape = (module.kernel_size, module.dilation, module.padding, module.stride)
        x = nn.functional.unfold(x, *shape).mT  # (N, T, in)
        g = g.flatten(3).permute(0, 3, 1, 2)
    else:
        x, g = x.unsqueeze(1), g.unsqueeze(1)
    return torch.cat([x, torch.ones_like(x[..., :1])], -1), g


# --- the peer against torch.func ------------------------------------------------------------------


def test_peer_diagonal_is_right(case):
    F = dense_fisher(case)
    peer = case.peer(pspace.PMatDiag)
    assert_close(peer.get_diag(), F.diagonal().float())
    assert_close(peer.trace(), F.trace().float())


def test_peer_kronecker_factors_are_right(case):
    p = case.model(case.x).softmax(-1).detach()
    H = p.diag_embed() - p.unsqueeze(-1) * p.unsqueeze(-2)
    peer = case.peer(pspace.PMatKFAC)
    for name, module in case.layers.items():
        x, g = layer_moments(case, module)
        N, T = x.shape[:2]
        A = torch.einsum("nti,ntj->ij", x, x) / (N * T)
        G = torch.einsum("ntco,ncd,ntdp->op", g, H, g) / N
        assert_close(kfac_block(module, *peer.data[name]), kfac_block(module, A, G))


def test_peer_ekfac_is_right(case):
    F = dense_fisher(case).float()
    peer = case.peer(pspace.PMatEKFAC)
    peer.update_diag((case.x.clone(), case.y))
    bases, diagonals = peer.data
    for name, where in block_slices(case).items():
        basis = eigenbasis(case.layers[name], *bases[name])
        assert_close(diagonals[name], (basis.mT @ F[where, where] @ basis).diagonal())
    assert_close(peer.trace(), F.trace())


# --- this package against the peer ----------------------------------------------------------------


def test_trace(case):
    expected = case.peer(pspace.PMatDiag).trace()
    for representation in ("dense", "block_diagonal", "diagonal", "ekfac"):
        assert_close(case.ours(representation).trace(), expected)
    assert_close(case.ours("kfac").trace(), case.peer(pspace.PMatKFAC).trace())


def test_diagonal(case):
    expected = case.peer(pspace.PMatDiag).get_diag()
    for representation in ("dense", "block_diagonal", "diagonal"):
        assert_close(case.ours(representation).diagonal(), expected)


def test_dense(case):
    assert_close(case.ours("dense").to_dense(), case.peer(pspace.PMatDense).to_torch())


def test_kfac_blocks(case):
    F, peer = case.ours("kfac"), case.peer(pspace.PMatKFAC)
    for name, module in case.layers.items():
        assert_close(F.block(name).to_dense(), kfac_block(module, *peer.data[name]))


def test_ekfac_blocks(case):
    F, peer = case.ours("ekfac"), case.peer(pspace.PMatEKFAC)
    peer.update_diag((case.x.clone(), case.y))
    bases, diagonals = peer.data
    expected = {
        name: ekfac_block(module, *bases[name], diagonals[name])
        for name, module in case.layers.items()
    }
    for name, block in expected.items():
        assert_close(F.block(name).to_dense(), block)
    assert_close(F.diagonal(), torch.cat([block.diagonal() for block in expected.values()]))
