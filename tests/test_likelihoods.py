"""Output directions and loss-Hessian products against torch.func, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nngeo_lazy.errors import DataError
from nngeo_lazy.likelihoods import Bernoulli, Categorical, Gaussian, resolve

VARIANCE = torch.tensor([0.3, 2.0, 1.1], dtype=torch.float64)

# name: (likelihood, outputs' shape, target, -log p of all examples in torch's own functions)
CASES = {
    "classes": (Categorical(), (4, 3), (4,), lambda f, y: F.cross_entropy(f, y, reduction="none")),
    "class_dim 2": (
        Categorical(class_dim=-1),
        (3, 4, 3),
        (3, 4),
        lambda f, y: F.cross_entropy(f.mT, y, reduction="none").sum(1),
    ),
    "image": (
        Categorical(),
        (2, 3, 2, 4),
        (2, 2, 4),
        lambda f, y: F.cross_entropy(f, y, reduction="none").sum((1, 2)),
    ),
    "next token": (
        Categorical(class_dim=2, shift=1),
        (3, 4, 5),
        (3, 4),
        lambda f, y: F.cross_entropy(f[:, :-1].mT, y[:, 1:], reduction="none").sum(1),
    ),
    "bernoulli": (
        Bernoulli(),
        (4, 2, 2),
        "bits",
        lambda f, y: F.binary_cross_entropy_with_logits(f, y, reduction="none").sum((1, 2)),
    ),
    "one logit": (
        Bernoulli(),
        (4,),
        "bits",
        lambda f, y: F.binary_cross_entropy_with_logits(f, y, reduction="none"),
    ),
    "gaussian": (
        Gaussian(0.7),
        (4, 3),
        "real",
        lambda f, y: F.mse_loss(f, y, reduction="none").sum(1) / 1.4,
    ),
    "gaussian per output": (
        Gaussian(VARIANCE),
        (4, 2, 3),
        "real",
        lambda f, y: ((f - y) ** 2 / (2 * VARIANCE)).sum((1, 2)),
    ),
}


def make(name):
    likelihood, shape, target, nll = CASES[name]
    f = torch.randn(shape, dtype=torch.float64)
    if target == "bits":
        y = torch.randint(2, shape).double()
    elif target == "real":
        y = torch.randn(shape, dtype=torch.float64)
    else:
        classes = shape[likelihood._class_dim(f, torch.zeros(target))]
        y = torch.randint(classes, target)
    return likelihood, f, y, nll


def hessians(nll, f, y):
    """(N, K, K), each example's Hessian in its outputs."""
    full = torch.func.hessian(lambda g: nll(g.view(f.shape), y).sum())(f.flatten())
    n, k = f.shape[0], f[0].numel()
    return torch.stack([full[i * k : (i + 1) * k, i * k : (i + 1) * k] for i in range(n)])


def root(likelihood, f, y, estimator="exact", **options):
    made = list(likelihood.directions(f, y, estimator, **options))
    assert len(made) == likelihood.num_directions(f, y, estimator, options.get("samples", 1))
    assert all(s.shape == f.shape and s.dtype == f.dtype and not s.requires_grad for s in made)
    return torch.stack(made).flatten(2) if f.dim() > 1 else torch.stack(made).unsqueeze(-1)


@pytest.mark.parametrize("name", CASES)
def test_exact_root_is_the_hessian(name):
    likelihood, f, y, nll = make(name)
    S = root(likelihood, f, y)  # (R,N,K)
    torch.testing.assert_close(torch.einsum("rnk,rnl->nkl", S, S), hessians(nll, f, y))


@pytest.mark.parametrize("name", CASES)
def test_loss_and_observed_score(name):
    likelihood, f, y, nll = make(name)
    torch.testing.assert_close(likelihood.loss(f, y), nll(f, y))
    g = torch.func.grad(lambda g: nll(g, y).sum())(f)
    (s,) = likelihood.directions(f, y, "empirical")
    torch.testing.assert_close(s, g)


@pytest.mark.parametrize("name", CASES)
def test_hessian_product(name):
    likelihood, f, y, nll = make(name)
    v = torch.randn(2, *f.shape, dtype=torch.float64)
    H = hessians(nll, f, y)
    expected = torch.einsum("nkl,bnl->bnk", H, v.reshape(2, len(f), -1)).view(v.shape)
    torch.testing.assert_close(likelihood.hessian_product(f, y, v), expected)
    torch.testing.assert_close(likelihood.hessian_product(f, y, v[0]), expected[0])

    def product(f, v):
        return likelihood.hessian_product(f, y, v)

    f, v = f.requires_grad_(), v[0].requires_grad_()
    assert torch.autograd.gradcheck(product, (f, v))


@pytest.mark.parametrize("name", CASES)
def test_monte_carlo_converges_and_is_seeded(name):
    likelihood, f, y, nll = make(name)
    draw = lambda seed, n: root(  # noqa: E731
        likelihood, f, y, "mc", samples=n, generator=torch.Generator().manual_seed(seed)
    )
    assert torch.equal(draw(1, 3), draw(1, 3))
    assert not torch.equal(draw(1, 3), draw(2, 3))
    S, H = draw(0, 4000), hessians(nll, f, y)
    assert (torch.einsum("rnk,rnl->nkl", S, S) - H).norm() < 0.1 * H.norm()


@pytest.mark.parametrize("name", ["class_dim 2", "next token", "image"])
def test_masked_positions_are_zero_everywhere(name):
    likelihood, f, y, nll = make(name)
    y[0], y[1, 0] = -100, -100
    if name == "next token":
        y[1, 2] = -100
    masked = lambda f, y: nll(f, y)  # noqa: E731 - torch ignores -100 as well
    torch.testing.assert_close(likelihood.loss(f, y), masked(f, y))
    H = hessians(masked, f, y)
    S = root(likelihood, f, y)
    torch.testing.assert_close(torch.einsum("rnk,rnl->nkl", S, S), H)
    v = torch.randn_like(f)
    expected = torch.einsum("nkl,nl->nk", H, v.flatten(1)).view(v.shape)
    torch.testing.assert_close(likelihood.hessian_product(f, y, v), expected)
    for estimator in ("mc", "empirical"):
        (s,) = likelihood.directions(f, y, estimator)
        assert s[0].abs().sum() == 0
    scored = y[:, 1:] if name == "next token" else y
    assert likelihood.num_terms(f, y) == (scored != -100).sum()


def test_number_of_terms():
    assert Gaussian().num_terms(torch.zeros(4, 3), None) == 12
    assert Bernoulli().num_terms(torch.zeros(4), None) == 4
    assert Categorical().num_terms(torch.zeros(4, 3), None) == 4
    assert Categorical(class_dim=2, shift=1).num_terms(torch.zeros(4, 5, 3), None) == 16


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-60, 60), min_size=2, max_size=6),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_root_is_accurate_for_any_logits(logits, dtype):
    f = torch.tensor([logits], dtype=dtype)
    S = torch.cat(list(Categorical().directions(f, None, "exact"))).double()
    p = f.double().softmax(-1)[0]
    H = -torch.outer(p, p)
    for k in range(len(p)):  # p (1 - p) without cancellation
        H[k, k] = p[k] * (p[:k].sum() + p[k + 1 :].sum())
    assert S.isfinite().all()
    tolerance = 50 * torch.finfo(dtype).eps
    assert (S.mT @ S - H).abs().max() <= tolerance * H.abs().max() + 1e-30


@pytest.mark.parametrize("gap", [20.0, 60.0, 80.0])
def test_small_probabilities_keep_their_digits(gap):
    f = torch.tensor([[gap, 0.0, 1.0]])
    S = torch.cat(list(Categorical().directions(f, None, "exact"))).double()
    p = f.double().softmax(-1)[0]
    H = -torch.outer(p, p)
    for k in range(3):
        H[k, k] = p[k] * (p[:k].sum() + p[k + 1 :].sum())
    scale = H.diagonal().sqrt()
    assert ((S.mT @ S - H).abs() <= 1e-5 * torch.outer(scale, scale)).all()
    (root,) = Bernoulli().directions(torch.tensor([gap]), None, "exact")
    exact = torch.tensor([-gap / 2], dtype=torch.float64).exp()
    torch.testing.assert_close(root.double(), exact, rtol=1e-5, atol=0)


def test_hessian_product_at_the_likeliest_class():
    f, v = torch.tensor([[20.0, 0.0, 0.0]]), torch.tensor([[0.3, -0.2, 0.5]])
    exact = Categorical().hessian_product(f.double(), None, v.double())
    got = Categorical().hessian_product(f, None, v)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gap", [20.0, 100.0, 1e4])
def test_a_large_gap_between_logits(dtype, gap):
    """One minus a cumulative sum would be NaN at 20 in float32."""
    for logits in ([gap, 0.0, 0.0], [0.0, gap, 0.0], [0.0, 0.0, gap]):
        f = torch.tensor([logits], dtype=dtype)
        S = torch.cat(list(Categorical().directions(f, None, "exact")))
        assert S.dtype == dtype
        assert S.isfinite().all()
        p = f.double().softmax(-1)[0]
        H = torch.diag(p) - torch.outer(p, p)
        assert (S.double().mT @ S.double() - H).abs().max() <= 0.02 * H.abs().max() + 1e-30
        v = torch.randn(1, 3, dtype=dtype)
        assert Categorical().hessian_product(f, None, v).isfinite().all()


class Largest(TorchDispatchMode):
    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.size = max(self.size, out.numel())
        return out


def test_no_matrix_of_classes_is_formed():
    f, y = torch.randn(2, 5000), torch.tensor([1, 4000])
    likelihood = Categorical()
    with Largest() as largest:
        likelihood.hessian_product(f, y, torch.randn_like(f))
        likelihood.loss(f, y)
        for estimator in ("exact", "mc", "empirical"):
            next(likelihood.directions(f, y, estimator))
    assert largest.size <= 20_000


def test_class_dimension():
    assert Categorical()._class_dim(torch.zeros(4, 3), None) == 1
    assert Categorical()._class_dim(torch.zeros(4, 3, 5), torch.zeros(4, 5)) == 1
    assert Categorical()._class_dim(torch.zeros(4, 5, 3), torch.zeros(4, 5)) == 2
    assert Categorical(class_dim=-2)._class_dim(torch.zeros(4, 5, 3), None) == 1
    for outputs, target, words in [
        (torch.zeros(4, 3, 3), torch.zeros(4, 3), "more than one dimension fits"),
        (torch.zeros(4, 3, 5), torch.zeros(4, 4), "no dimension fits"),
        (torch.zeros(4, 3, 5), None, "no target"),
    ]:
        with pytest.raises(DataError, match=rf"{words}.*class_dim=|{words}") as caught:
            Categorical()._class_dim(outputs, target)
        assert "Categorical(class_dim=...)" in str(caught.value)
    with pytest.raises(DataError, match="class_dim=0 is not a dimension"):
        Categorical(class_dim=0)._class_dim(torch.zeros(4, 3), None)
    with pytest.raises(DataError, match=r"dimension of classes.*'bernoulli'.*'gaussian'"):
        Categorical().check(torch.zeros(4), None)


def test_shift_needs_positions():
    with pytest.raises(DataError, match=r"shift=1 needs outputs with more than 1 positions"):
        Categorical(shift=1).check(torch.zeros(4, 3), None)


def test_variance():
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(DataError, match="positive, finite variance"):
            Gaussian(bad)
    with pytest.raises(DataError, match=r"broadcasts to the outputs of an example \(3,\).*\(2,\)"):
        Gaussian(torch.ones(2)).check(torch.zeros(4, 3), None)


def test_bits():
    f = torch.zeros(2, 1)
    flags = Bernoulli().flags(f, torch.tensor([[0.5], [1.0]]))
    assert [message for message, wrong in flags.items() if wrong] == [
        "expected labels 0 or 1, but some are neither"
    ]


def test_resolve():
    f, y = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)
    assert isinstance(resolve(None, f, y), Categorical)
    assert isinstance(resolve("gaussian", f, y), Gaussian)
    own = Bernoulli()
    assert resolve(own, f, y) is own
    for target in (None, y.float(), y[:2]):
        with pytest.raises(DataError, match="cannot tell the likelihood"):
            resolve(None, f, target)
    with pytest.raises(DataError, match="cannot tell the likelihood"):
        resolve(None, torch.zeros(4, 1), y)
