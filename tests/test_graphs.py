"""The nodes of one graph as examples: a batch that cannot be cut, and layers without an axis."""

import pytest
import torch
from torch import nn

import nngeo_lazy as ng
from nngeo_lazy.jacobian import general

from cases import close

pytestmark = pytest.mark.usefixtures("float64")

NODES, FEATURES, HIDDEN, CLASSES = 70, 3, 4, 3


class Convolutions(nn.Module):
    """Two graph convolutions (Kipf and Welling 2017); the graph is part of the model or of data."""

    def __init__(self, edges):
        super().__init__()
        self.register_buffer("edges", edges)
        self.first, self.last = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, CLASSES)

    def forward(self, x, edges=None):
        edges = self.edges if edges is None else edges
        return edges @ self.last(torch.tanh(edges @ self.first(x)))


class Messages(nn.Module):
    """Messages along a list of edges, summed where they arrive."""

    def __init__(self, edges):
        super().__init__()
        self.register_buffer("index", edges.nonzero().mT)
        self.message, self.own = nn.Linear(FEATURES, HIDDEN), nn.Linear(FEATURES, HIDDEN)
        self.last = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x):
        source, target = self.index
        sent = torch.zeros(len(x), HIDDEN).index_add(0, target, self.message(x[source]))
        return self.last(torch.tanh(self.own(x) + sent))


@pytest.fixture
def edges():
    edges = (torch.rand(NODES, NODES) < 3 / NODES).double()
    edges = ((edges + edges.mT + torch.eye(NODES)) > 0).double()
    degrees = edges.sum(1).rsqrt()
    return degrees[:, None] * edges * degrees


def exact(model, x):
    """The Fisher information of independent unit Gaussians, by a backward pass for each number."""
    outputs, parameters = model(x), list(model.parameters())
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(f, parameters, retain_graph=True)])
        for f in outputs.flatten()
    ]
    J = torch.stack(rows)
    return J.mT @ J / len(x)


@pytest.mark.parametrize("kind", [Convolutions, Messages])
def test_nodes_are_examples(kind, edges):
    model, x = kind(edges), torch.randn(NODES, FEATURES)
    want = exact(model, x)
    close(ng.FIM(model, x, "dense", likelihood="gaussian").to_dense(), want)
    close(ng.FIM(model, x, "diagonal", likelihood="gaussian").diagonal(), want.diagonal())
    v = torch.randn(len(want))
    F = ng.FIM(model, x, representation=ng.representations.Implicit(), likelihood="gaussian")
    close(F @ v, want @ v)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", [torch.strided, torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize("representation", ["diagonal", "implicit"])
def test_a_graph_in_the_model_or_among_the_data(representation, layout, edges):
    """A dense or sparse adjacency matrix has as many rows as there are nodes, and is not cut."""
    given = edges if layout is torch.strided else edges.to_sparse(layout=layout)
    model, x = Convolutions(given), torch.randn(NODES, FEATURES)
    want = exact(model, x)
    empty, y = Convolutions(None), torch.randint(0, CLASSES, (NODES,))
    empty.load_state_dict({k: v for k, v in model.state_dict().items() if k != "edges"})
    for net, data in (
        (model, x),
        (empty, ((x, given), y)),
        (empty, {"x": x, "edges": given, "labels": y}),
    ):
        F = ng.FIM(net, data, representation, likelihood="gaussian")
        close(F.diagonal(), want.diagonal())


@pytest.mark.parametrize("limit", [general.MASKED_BYTES, 8 * NODES * CLASSES * 5])
def test_backward_passes_are_made_in_pieces(limit, edges, monkeypatch):
    """Of many nodes and all layers together, as many as fit into memory."""
    monkeypatch.setattr(general, "MASKED_BYTES", limit)
    model, x = Convolutions(edges), torch.randn(NODES, FEATURES)
    calls, gradients = [], torch.autograd.grad

    def grad(outputs, inputs, cotangents, *args, **options):
        if options.get("is_grads_batched"):
            calls.append(len(cotangents))
        return gradients(outputs, inputs, cotangents, *args, **options)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    F = ng.FIM(model, x, "diagonal", likelihood="gaussian", estimator="mc", seed=0)
    pieces = [n for n in calls if n > 1]
    assert sum(pieces) >= NODES - 1
    assert max(pieces) == (general.MASKED_EXAMPLES if limit > 2**20 else 5)
    assert F.trace() > 0


class Own(torch.autograd.Function):
    """An operation without a rule for vmap."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return torch.as_tensor(2 * g.numpy())


def test_what_vmap_refuses_is_made_one_by_one(edges):
    class Foreign(Convolutions):
        def forward(self, x):
            return Own.apply(super().forward(x))

    model, x = Foreign(edges[:6, :6]), torch.randn(6, FEATURES)
    F = ng.FIM(model, x, "diagonal", likelihood="gaussian")
    close(F.diagonal(), exact(model, x).diagonal())


class Spread(nn.Module):
    """Nodes that take from their neighbours, by a product with a sparse matrix."""

    def __init__(self, layout):
        super().__init__()
        self.a, self.b, self.layout = nn.Linear(4, 4), nn.Linear(4, 3), layout
        self.register_buffer("near", (torch.rand(3, 3) > 0.4).double())

    def forward(self, x):
        near = self.near.to_sparse(layout=self.layout)
        h = self.a(x).transpose(0, 1).reshape(3, -1)
        return self.b((near @ h).view(3, len(x), 4).transpose(0, 1).tanh().sum(1))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_matrices_inside_of_a_model(layout):
    torch.manual_seed(0)
    model, x, y = Spread(layout).double(), torch.randn(5, 3, 4).double(), torch.randint(3, (5,))
    parameters, total = list(model.parameters()), 0
    for one in x.split(1):
        f = model(one)[0]
        rows = [torch.autograd.grad(each, parameters, retain_graph=True) for each in f]
        J, p = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]), f.softmax(0)
        total = total + J.mT @ (p.diag() - torch.outer(p, p)).detach() @ J / 5
    v = torch.linspace(-1, 1, len(total)).double()
    data = [(x, y)]
    F = ng.FIM(model, data, "implicit", likelihood="categorical")
    torch.testing.assert_close(F @ v, total @ v)
    dense = ng.FIM(model, data, "dense", likelihood="categorical")
    torch.testing.assert_close(dense.to_dense(), total)
    loss = nn.functional.cross_entropy(model(x), y)
    slope = torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)]
    )
    hv = torch.autograd.grad(slope @ v, parameters)
    H = ng.Hessian(model, data, loss=nn.CrossEntropyLoss())
    torch.testing.assert_close(H @ v, torch.cat([g.flatten() for g in hv]))
