"""Output directions and loss-Hessian products against torch.func, in float64."""

import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nngeo_lazy.errors import DataError, NonFiniteError, NotPositiveDefiniteError
from nngeo_lazy.likelihoods import (
    Bernoulli,
    CallableLoss,
    Categorical,
    Gaussian,
    Poisson,
    resolve,
    resolve_loss,
)

close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)

VARIANCE = torch.tensor([0.3, 2.0, 1.1], dtype=torch.float64)
SIGMA = torch.tensor([[2.0, 0.5, -0.3], [0.5, 1.0, 0.2], [-0.3, 0.2, 0.7]], dtype=torch.float64)
WEIGHT = torch.tensor([0.3, 2.0, 0.0], dtype=torch.float64)
POSITIVE = torch.tensor([0.5, 3.0], dtype=torch.float64)


def bce(f, y, **options):
    each = F.binary_cross_entropy_with_logits(f, y, reduction="none", **options)
    return each.reshape(len(f), -1).sum(1)


def ce(f, y, **options):
    """Classes in dimension 1, summed over positions."""
    each = F.cross_entropy(f, y, reduction="none", **options)
    return each.reshape(len(f), -1).sum(1)


def normal(f, y):
    inverse = SIGMA.inverse()
    return torch.einsum("...i,ij,...j->...", f - y, inverse, f - y).reshape(len(f), -1).sum(1) / 2


def log_cosh(f, y):
    return (f - y).cosh().log().flatten(1).sum(1)


def pseudo_huber(f, y):  # its Hessian is full
    return (1 + (f - y).square().flatten(1).sum(1)).sqrt()


def multinomial(f, y):
    return f.flatten(1).logsumexp(1) - (f * y).flatten(1).sum(1)


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
    "covariance": (Gaussian(SIGMA), (4, 3), "real", normal),
    "covariance at positions": (Gaussian(SIGMA), (3, 2, 3), "real", normal),
    "poisson": (
        Poisson(),
        (4, 3),
        "count",
        lambda f, y: F.poisson_nll_loss(f, y, reduction="none").sum(1),
    ),
    "log rate": (Poisson(), (4,), "count", lambda f, y: f.exp() - y * f),
    "soft labels": (Bernoulli(), (4, 3), "soft", bce),
    "pos_weight": (Bernoulli(2.3), (4, 3), "soft", lambda f, y: bce(f, y, pos_weight=0 * f + 2.3)),
    "pos_weight per output": (
        Bernoulli(POSITIVE),
        (3, 2, 2),
        "bits",
        lambda f, y: bce(f, y, pos_weight=POSITIVE),
    ),
    "weight": (Categorical(weight=WEIGHT), (6, 3), (6,), lambda f, y: ce(f, y, weight=WEIGHT)),
    "smoothing": (
        Categorical(label_smoothing=0.2),
        (4, 3),
        (4,),
        lambda f, y: ce(f, y, label_smoothing=0.2),
    ),
    "weighted image": (
        Categorical(ignore_index=1, weight=WEIGHT, label_smoothing=0.3),
        (2, 3, 2, 2),
        (2, 2, 2),
        lambda f, y: ce(f, y, ignore_index=1, weight=WEIGHT, label_smoothing=0.3),
    ),
    "weighted tokens": (
        Categorical(class_dim=2, shift=1, ignore_index=0, weight=WEIGHT, label_smoothing=0.1),
        (3, 4, 3),
        (3, 4),
        lambda f, y: ce(f[:, :-1].mT, y[:, 1:], ignore_index=0, weight=WEIGHT, label_smoothing=0.1),
    ),
    "log cosh": (CallableLoss(log_cosh), (4, 2, 2), "real", log_cosh),
    "pseudo Huber": (CallableLoss(pseudo_huber), (4, 3), "real", pseudo_huber),
    "multinomial": (CallableLoss(multinomial), (4, 3), "soft", multinomial),
    "one output": (
        CallableLoss(lambda f, y: (f - y) ** 4),
        (4,),
        "real",
        lambda f, y: (f - y) ** 4,
    ),
}


def make(name):
    likelihood, shape, target, nll = CASES[name]
    f = torch.randn(shape, dtype=torch.float64)
    if target == "bits":
        y = torch.randint(2, shape).double()
    elif target == "soft":
        y = torch.rand(shape, dtype=torch.float64)
    elif target == "count":
        y = torch.randint(5, shape)
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
    close(torch.einsum("rnk,rnl->nkl", S, S), hessians(nll, f, y))


@pytest.mark.parametrize("name", CASES)
def test_loss_and_observed_score(name):
    likelihood, f, y, nll = make(name)
    likelihood.check(f, y)
    assert not any(likelihood.flags(f, y).values())
    close(likelihood.loss(f, y), nll(f, y))
    g = torch.func.grad(lambda g: nll(g, y).sum())(f)
    (s,) = likelihood.directions(f, y, "empirical")
    close(s, g)


@pytest.mark.parametrize("name", CASES)
def test_hessian_product(name):
    likelihood, f, y, nll = make(name)
    v = torch.randn(2, *f.shape, dtype=torch.float64)
    H = hessians(nll, f, y)
    expected = torch.einsum("nkl,bnl->bnk", H, v.reshape(2, len(f), -1)).view(v.shape)
    close(likelihood.hessian_product(f, y, v), expected)
    close(likelihood.hessian_product(f, y, v[0]), expected[0])

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
    S, H = draw(0, 1500), hessians(nll, f, y)
    assert (torch.einsum("rnk,rnl->nkl", S, S) - H).norm() <= 0.15 * H.norm()


@pytest.mark.parametrize("name", ["class_dim 2", "next token", "image"])
def test_masked_positions_are_zero_everywhere(name):
    likelihood, f, y, nll = make(name)
    y[0], y[1, 0] = -100, -100
    if name == "next token":
        y[1, 2] = -100
    masked = lambda f, y: nll(f, y)  # noqa: E731 - torch ignores -100 as well
    close(likelihood.loss(f, y), masked(f, y))
    H = hessians(masked, f, y)
    S = root(likelihood, f, y)
    close(torch.einsum("rnk,rnl->nkl", S, S), H)
    v = torch.randn_like(f)
    expected = torch.einsum("nkl,nl->nk", H, v.flatten(1)).view(v.shape)
    close(likelihood.hessian_product(f, y, v), expected)
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
    for shape in ((2,), (2, 2), (4, 3)):
        match = rf"broadcasts to .* example \(3,\), or a covariance .* got shape \({shape[0]},"
        with pytest.raises(DataError, match=match):
            Gaussian(torch.ones(shape)).check(torch.zeros(4, 3), None)


def test_covariance_is_symmetric_positive_definite():
    skew, indefinite = (
        torch.tensor([[1.0, 0.5], [0.2, 1.0]]),
        torch.tensor([[1.0, 2.0], [2.0, 1.0]]),
    )
    for bad in (skew, indefinite, torch.full((2, 2), math.nan)):
        with pytest.raises(DataError, match="symmetric positive definite covariance, got tensor"):
            Gaussian(bad).check(torch.zeros(4, 2), None)
    with pytest.raises(DataError, match="symmetric positive definite"):
        Gaussian(-indefinite)


def test_a_matrix_that_broadcasts_is_a_variance_for_each_output():
    f = torch.zeros(3, 2, 2)
    variance = torch.tensor([[1.0, 2.0], [4.0, 5.0]])
    Gaussian(variance).check(f, None)
    close(Gaussian(variance).hessian_product(f, None, torch.ones_like(f)), (f + 1) / variance)
    with pytest.raises(DataError, match=r"for each output of an example \(2, 2\), got tensor"):
        Gaussian(torch.tensor([[1.0, -0.5], [-0.5, 1.0]])).check(f, None)


def test_variance_of_numbers():
    f, v = torch.zeros(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    given, nested = Gaussian(VARIANCE.tolist()), Gaussian(SIGMA.numpy())
    close(given.hessian_product(f, None, v), v / VARIANCE)
    close(nested.hessian_product(f, None, v), v @ SIGMA.inverse())


def test_covariance_in_low_precision():
    f, v = torch.zeros(2, 3, dtype=torch.bfloat16), torch.randn(2, 3).bfloat16()
    product = Gaussian(SIGMA).hessian_product(f, None, v)
    close(product, (v.double() @ SIGMA.inverse()).bfloat16(), rtol=0.01, atol=1e-3)


def test_bits():
    f = torch.zeros(2, 1)
    flags = Bernoulli().flags(f, torch.tensor([[0.5], [1.1]]))
    assert [message for message, wrong in flags.items() if wrong] == [
        "expected labels between 0 and 1, but some are outside"
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


def test_values_compare_and_hash():
    assert Categorical(weight=[1.0, 0.5]) == Categorical(weight=torch.tensor([1.0, 0.5]))
    assert Categorical(weight=[1.0, 0.3]).weight == (1.0, 0.3)
    assert Categorical(weight=(1, 2)) != Categorical(weight=(1, 3))
    assert Bernoulli(torch.tensor([[1.0, 2.0]])) == Bernoulli(((1.0, 2.0),))
    made = {Categorical(), Categorical(weight=[0.1, 0.2]), Bernoulli(2.0), Bernoulli(), Poisson()}
    assert len(made | {Categorical(weight=(0.1, 0.2)), Bernoulli(2), Poisson()}) == 5
    assert repr(Bernoulli(POSITIVE)) == "Bernoulli(pos_weight=(0.5, 3.0))"


def test_options_that_do_not_fit():
    for smoothing in (-0.1, 1.0, math.nan):
        with pytest.raises(DataError, match="label_smoothing from 0 to below 1, got"):
            Categorical(label_smoothing=smoothing)
    for weight in ([-1.0, 1.0], [math.inf, 1.0], 2.0, torch.ones(2, 2)):
        with pytest.raises(
            DataError, match=r"weight for each class \(C,\), nonnegative and finite"
        ):
            Categorical(weight=weight)
    with pytest.raises(DataError, match=r"expected 3 class weights for outputs \(4, 3\).*got 2"):
        Categorical(weight=[1.0, 2.0]).check(torch.zeros(4, 3), None)
    for weight in (0.0, -1.0, math.nan, [1.0, math.inf]):
        with pytest.raises(DataError, match="positive, finite pos_weight, got"):
            Bernoulli(weight)
    with pytest.raises(DataError, match=r"pos_weight that broadcasts .* \(3,\), got shape \(2,\)"):
        Bernoulli([1.0, 2.0]).check(torch.zeros(4, 3), None)


@pytest.mark.parametrize(
    ("likelihood", "reason"),
    [
        (Categorical(weight=WEIGHT), "class weights"),
        (Categorical(label_smoothing=0.1), "label smoothing"),
        (Categorical(weight=WEIGHT, label_smoothing=0.1), "class weights and label smoothing"),
        (Bernoulli(2.0), "pos_weight"),
    ],
)
def test_a_reweighted_loss_is_no_likelihood(likelihood, reason):
    assert likelihood.reweighted == reason
    for estimator in ("exact", "mc"):
        with pytest.raises(DataError) as caught:
            likelihood.require_likelihood(estimator)
        assert str(caught.value) == (
            f"the {estimator} Fisher is an expectation over the model's own labels, and a loss "
            f"with {reason} is no likelihood: take GGN(..., loss=...), estimator='empirical', or "
            f"drop the {reason}"
        )
    likelihood.require_likelihood("empirical")


def test_likelihoods_and_functions():
    for likelihood in (Categorical(), Bernoulli(), Poisson(), Gaussian(SIGMA)):
        assert likelihood.reweighted == ""
        likelihood.require_likelihood("exact")
    loss = CallableLoss(log_cosh)
    loss.require_likelihood("empirical")
    with pytest.raises(DataError, match=r"the mc Fisher .* does not say .* GGN\(\.\.\., loss="):
        loss.require_likelihood("mc")


@pytest.mark.parametrize("likelihood", [Categorical(weight=WEIGHT), Bernoulli([1.0, 2.0, 3.0])])
def test_weights_need_labels(likelihood):
    f = torch.zeros(2, 3)
    message = rf"loss with {likelihood.reweighted} depends on the labels, but .* no target"
    for estimator in ("exact", "mc"):
        with pytest.raises(DataError, match=message):
            next(likelihood.directions(f, None, estimator))
    with pytest.raises(DataError, match=message):
        likelihood.hessian_product(f, None, f)
    smooth = Categorical(label_smoothing=0.5)  # its Hessian is the same at every label
    close(root(smooth, f, None), root(Categorical(), f, None))


def test_labels_of_counts():
    f = torch.zeros(2)
    for bad in ([-1.0, 0.0], [math.nan, 0.0], [0.0, math.inf]):
        flags = Poisson().flags(f, torch.tensor(bad))
        wrong = [message for message, flag in flags.items() if flag]
        assert wrong == ["expected labels from 0 up, but some are negative, NaN or inf"]
    assert not any(Poisson().flags(f, torch.tensor([0.5, 3.0])).values())
    flags = Poisson().flags(torch.tensor([0.0, 100.0]), None)
    (wrong,) = [message for message, flag in flags.items() if flag]
    assert wrong == "expected log rates with a finite rate, but exp of some outputs overflows"
    assert any(Poisson().flags(torch.tensor([math.nan]), None).values())
    next(Poisson().directions(torch.tensor([math.nan, 100.0]), None, "mc"))  # does not crash


@pytest.mark.parametrize("rate", [-80.0, -1.0, 10.0, 21.0, 40.0, 80.0])
def test_extreme_rates(rate):
    f = torch.full((4000,), rate)
    assert not any(Poisson().flags(f, None).values())
    (S,) = Poisson().directions(f, None, "exact")
    exact = torch.full_like(f, rate / 2, dtype=torch.float64).exp()
    close(S.double(), exact, rtol=1e-5, atol=0.0)
    close(Poisson().hessian_product(f, None, f / f).double(), exact**2, rtol=1e-5, atol=0.0)
    (s,) = Poisson().directions(f, None, "mc", generator=torch.Generator().manual_seed(0))
    assert s.isfinite().all()
    if rate > -5:  # below, all labels are zero
        assert abs(s.double().square().mean() / exact[0] ** 2 - 1) < 0.1
        assert abs(s.double().mean() / exact[0]) < 0.1


@pytest.mark.parametrize("logit", [-80.0, 80.0])
def test_extreme_logits_with_weights(logit):
    f, y = torch.tensor([[logit, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.3]])
    for estimator in ("exact", "mc", "empirical"):
        for s in Bernoulli(3.0).directions(f, y, estimator):
            assert s.isfinite().all()
        for s in Categorical(weight=WEIGHT, label_smoothing=0.1).directions(
            f, torch.tensor([1]), estimator
        ):
            assert s.isfinite().all()


finite = st.floats(-30, 30)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(finite, st.floats(0, 4)), min_size=2, max_size=5),
    st.integers(0, 100),
    st.floats(0, 0.99),
)
def test_weighted_cross_entropy_at_any_logits(classes, label, smoothing):
    logits, weights = torch.tensor(classes, dtype=torch.float64).unbind(1)
    f, y = logits[None], torch.tensor([label % len(logits)])
    likelihood = Categorical(weight=weights, label_smoothing=smoothing)
    nll = functools.partial(ce, weight=weights, label_smoothing=smoothing)
    close(likelihood.loss(f, y), nll(f, y))
    S = root(likelihood, f, y)
    close(torch.einsum("rnk,rnl->nkl", S, S), hessians(nll, f, y))
    (s,) = likelihood.directions(f, y, "empirical")
    close(s, torch.func.grad(lambda g: nll(g, y).sum())(f))


@settings(deadline=None, max_examples=40)
@given(finite, st.floats(0, 1), st.floats(0.01, 100))
def test_weighted_binary_cross_entropy_at_any_logit(logit, label, weight):
    f, y = torch.tensor([[logit], [label]], dtype=torch.float64)
    likelihood = Bernoulli(weight)
    nll = functools.partial(bce, pos_weight=torch.tensor([weight], dtype=torch.float64))
    close(root(likelihood, f, y).square().flatten(), hessians(nll, f, y).flatten())
    (s,) = likelihood.directions(f, y, "empirical")
    close(s, torch.func.grad(lambda g: nll(g, y).sum())(f))


def test_callable_needs_losses_of_examples():
    f, y = torch.randn(4, 3), torch.randn(4, 3)
    for function, got in [
        (lambda f, y: F.mse_loss(f, y), r"shape \(\)"),
        (lambda f, y: F.mse_loss(f, y, reduction="none"), r"shape \(4, 3\)"),
        (lambda f, y: 3.0, "3.0"),
    ]:
        with pytest.raises(
            DataError, match=rf"per-example losses \(4,\), got {got}: use reduction"
        ):
            CallableLoss(function).check(f, y)


def test_callable_of_one_example_at_a_time():
    f, y = torch.randn(4, 3), torch.randn(4, 3)
    for function in (
        lambda f, y: log_cosh(f, y) / len(f),
        lambda f, y: log_cosh(f - f.mean(0), y),
        lambda f, y: log_cosh(f, y) * torch.rand(()),
        lambda f, y: log_cosh(f, y + torch.zeros(4, 1)),
    ):
        loss = CallableLoss(function)
        (message,) = [message for message, flag in loss.flags(f, y).items() if flag]
        assert message.startswith("expected the loss of an example to depend on that example alone")
        assert "finite" not in message
    assert not any(CallableLoss(log_cosh).flags(f, y).values())
    assert not any(CallableLoss(lambda f, y: f.square().sum(1)).flags(f, None).values())
    assert any(CallableLoss(log_cosh).flags(f * math.nan, y).values())


def test_callable_must_be_convex():
    concave = CallableLoss(lambda f, y: (f - y).cos().sum(1))
    f = torch.zeros(4, 3)
    message = r"not convex in the outputs .*negative eigenvalue.* take Hessian, or a convex loss"
    for estimator in ("exact", "mc"):
        with pytest.raises(NotPositiveDefiniteError, match=message):
            next(concave.directions(f, f, estimator))
    next(concave.directions(f, f, "empirical"))
    rooted = CallableLoss(lambda f, y: (f - y).norm(dim=1) ** 1.5)
    with pytest.raises(NonFiniteError, match="finite Hessian in the outputs"):
        next(rooted.directions(f, f, "exact"))
    next(CallableLoss(log_cosh).directions(f * math.nan, f, "exact"))  # flagged, does not crash


def test_callable_in_low_precision():
    for dtype in (torch.float32, torch.bfloat16):
        for gap in (0.0, 20.0, 80.0):  # rounding is no negative curvature
            f, y = torch.tensor([[gap, 0.0, 0.0]], dtype=dtype), torch.eye(3, dtype=dtype)[:1]
            S = root(CallableLoss(multinomial), f, y)
            assert S.dtype == dtype
            H = hessians(multinomial, f.double(), y.double())
            S = S.double()
            close(torch.einsum("rnk,rnl->nkl", S, S), H, rtol=0, atol=0.02 * H.abs().max() + 1e-6)


def test_callable_that_is_linear():
    for loss in (CallableLoss(lambda f, y: f.sum(1)), CallableLoss(lambda f, y: 0 * y.sum(1))):
        f = torch.randn(4, 3)
        assert all((s == 0).all() for s in loss.directions(f, f, "exact"))
        assert (loss.hessian_product(f, f, f) == 0).all()


MODULES = {
    "cross entropy": (nn.CrossEntropyLoss, {}, (3,), ()),
    "cross entropy, weights": (
        nn.CrossEntropyLoss,
        {"weight": WEIGHT, "label_smoothing": 0.2, "ignore_index": 1},
        (3, 2, 2),
        (2, 2),
    ),
    "cross entropy, probabilities": (
        nn.CrossEntropyLoss,
        {"weight": WEIGHT, "label_smoothing": 0.2},
        (3, 2),
        "probabilities",
    ),
    "nll": (nn.NLLLoss, {"weight": WEIGHT}, (3, 2), (2,)),
    "bce": (nn.BCEWithLogitsLoss, {}, (2,), "soft"),
    "bce, pos_weight": (nn.BCEWithLogitsLoss, {"pos_weight": POSITIVE}, (3, 2), "soft"),
    "bce, weight": (nn.BCEWithLogitsLoss, {"weight": POSITIVE}, (3, 2), "soft"),
    "bce, pos_weight of a row": (
        nn.BCEWithLogitsLoss,
        {"pos_weight": POSITIVE[None]},
        (2,),
        "soft",
    ),
    "mse": (nn.MSELoss, {}, (3,), "real"),
    "poisson": (nn.PoissonNLLLoss, {"full": True}, (3,), "soft"),
    "poisson, rates": (nn.PoissonNLLLoss, {"log_input": False}, (3,), "soft"),
    "huber": (nn.HuberLoss, {"delta": 0.7}, (3, 2), "real"),
    "soft margin": (nn.SoftMarginLoss, {}, (3,), "real"),
    "kl": (nn.KLDivLoss, {}, (3,), "soft"),
    "multi-label": (nn.MultiLabelSoftMarginLoss, {}, (3,), "soft"),
}


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
@pytest.mark.parametrize(
    ("name", "reduction"),
    [*itertools.product(MODULES, ["mean", "sum", "none"]), ("kl", "batchmean")],
)
def test_modules_keep_their_reduction(name, reduction):
    kind, options, example, target = MODULES[name]
    module = kind(**options, reduction=reduction)
    f = torch.randn(7, *example, dtype=torch.float64)
    if name == "poisson, rates":
        f = f.exp()
    if isinstance(target, tuple):
        y = torch.randint(3, (7, *target))
    else:
        y = torch.randn_like(f) if target == "real" else torch.rand_like(f)
        y = y.softmax(1) if target == "probabilities" else y
    if kind is nn.SoftMarginLoss:
        y = y.sign()

    k = f[0].numel()
    got, total = torch.zeros(7, k, 7, k, dtype=torch.float64), 0.0
    for part in (slice(0, 5), slice(5, 7)):
        likelihood, reduced = resolve_loss(module, f[part], y[part])
        likelihood.check(f[part], y[part])
        assert not any(likelihood.flags(f[part], y[part]).values())
        S = root(likelihood, f[part], y[part])
        for i, H in enumerate(torch.einsum("rnk,rnl->nkl", S, S)):
            got[part.start + i, :, part.start + i] = H
        total = total + reduced.denominator(f[part], y[part])
    assert total.shape == ()
    assert total.dtype == torch.float64
    got = got / reduced.total(float(total))

    def whole(g):
        loss = module(g.view_as(f), y).sum()
        return loss / 7 if reduction == "none" else loss

    rows = functools.partial(torch.func.jacrev, chunk_size=1)  # not all of torch has vmap
    expected = rows(rows(whole))(f.flatten()).view(7, k, 7, k)
    close(got, expected)
    assert module.reduction == reduction


def test_modules_in_closed_form():
    f, y = torch.zeros(4, 3), torch.zeros(4, 3)
    labels = torch.zeros(4, dtype=torch.int64)
    for module, target, expected in [
        (nn.MSELoss(), y, Gaussian),
        (nn.PoissonNLLLoss(), y, Poisson),
        (nn.BCEWithLogitsLoss(), y, Bernoulli),
        (nn.CrossEntropyLoss(), labels, Categorical),
        (nn.CrossEntropyLoss(), y, CallableLoss),
        (nn.HuberLoss(), y, CallableLoss),
        (type("Mine", (nn.MSELoss,), {})(), y, CallableLoss),
    ]:
        assert type(resolve_loss(module, f, target)[0]) is expected
    module = nn.HuberLoss()
    once, again, other = (
        repr(resolve_loss(m, f, y)[0]) for m in (module, module, nn.HuberLoss(delta=2.0))
    )
    assert once == again != other


def test_mean_over_no_label():
    f, y = torch.zeros(4, 3), torch.full((4,), -100)
    _, reduced = resolve_loss(nn.CrossEntropyLoss(), f, y)
    assert reduced.denominator(f, y) == 0
    with pytest.raises(DataError, match="at least one scored label, but all are masked"):
        reduced.total(0.0)


def test_resolve_loss():
    f, y = torch.zeros(4, 3), torch.zeros(4, 3)
    own = Poisson()
    for loss, expected in [("gaussian", Gaussian), (own, Poisson), (log_cosh, CallableLoss)]:
        likelihood, reduced = resolve_loss(loss, f, y)
        assert type(likelihood) is expected
        assert repr(reduced) == "Reduction(kind='examples')"
        assert reduced.total(float(reduced.denominator(f, y) + reduced.denominator(f, y))) == 8
    assert resolve_loss(own, f, y)[0] is own
    with pytest.raises(DataError, match="Gauss-Newton matrix is zero; take Hessian"):
        resolve_loss("output", f, y)
    for unknown in ("huber", None, 3, nn.MSELoss):
        with pytest.raises(DataError, match=r"unknown loss .*'poisson'.*torch\.nn loss.*\(N,\)"):
            resolve_loss(unknown, f, y)
    for module in (nn.Linear(3, 3), nn.GaussianNLLLoss(), nn.CTCLoss()):
        with pytest.raises(DataError, match=r"loss of two arguments.*wrap it in a function"):
            resolve_loss(module, f, y)
    mean = nn.L1Loss(reduction="median")
    with pytest.raises(DataError, match=r"'batchmean', 'mean', 'none', 'sum'.*'median'"):
        resolve_loss(mean, f, y)
