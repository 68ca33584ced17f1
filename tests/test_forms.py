"""Every operation of the canonical forms against plain rows, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from nngeo_lazy.jacobian import forms, grams, inputs
from nngeo_lazy.jacobian.forms import Outer, Rows, Stored, second_moment
from nngeo_lazy.jacobian.inputs import DenseInputs, IndexInputs, PatchInputs
from nngeo_lazy.jacobian.moments import moment
from nngeo_lazy.jacobian.patch_sums import Correlations, Pixels, Products
from nngeo_lazy.jacobian.patches import Geometry, unfold
from nngeo_lazy.jacobian.summed import Summed
from nngeo_lazy.layout import Layout, Piece, assemble
from nngeo_lazy.operators.decompose import eigh

pytestmark = pytest.mark.usefixtures("float64")

R, N, T, O = 3, 4, 5, 2  # noqa: E741


def dense(groups=1, t=T, bias=True):
    return Outer(torch.randn(R, N, groups, t, O), DenseInputs(torch.randn(N, groups, t, 3)), bias)


def indexed():
    index = torch.tensor([[0, 1, 1, 0, 4], [2, 2, 2, 2, 2], [3, 0, 1, 2, 4], [4, 4, 0, 0, 1]])
    x = IndexInputs(index, 6, index != 4, torch.float64)
    return Outer(x.masked(torch.randn(R, N, 1, T, O)), x, False)


def patches(uses=1, flipped=False):
    geometry = Geometry((2, 3), (2, 1), ((1, 0), (-1, 1)), (1, 1), 2, flipped)
    images = torch.randn(N * uses, 4, 5, 6)
    t = geometry.positions((5, 6)) * uses
    return Outer(torch.randn(R, N, 2, t, O), PatchInputs(images, geometry, uses), True)


def summed():
    """An embedding of 6 words in 2 dimensions, tied with a head; and with a grouped use."""
    head = Outer(torch.randn(R, N, 1, T, 6), DenseInputs(torch.randn(N, 1, T, 2)), False)
    grouped = Outer(torch.randn(R, N, 3, T, 2), DenseInputs(torch.randn(N, 3, T, 2)), False)
    layouts = (
        Layout(1, 2, (Piece(0, 6, transposed=True),)),
        Layout(1, 6, (Piece(0, 2),)),
        Layout(3, 2, (Piece(0, 2, transposed=True),)),
    )
    return Summed((indexed(), head, grouped), layouts)


def bias_alone():
    return Outer(torch.randn(R, N, 1, T, O), None, True)


def rows_alone():
    return Stored(torch.randn(R, N, 7))


def rows_streamed():
    values = torch.randn(R, N, 7)
    return Rows(lambda start, stop: values[:, start:stop], (R, N, 7), values.dtype)


FORMS = {
    "dense": dense,
    "no bias": lambda: dense(bias=False),
    "one position": lambda: dense(t=1),
    "groups": lambda: dense(groups=3),
    "groups, one position": lambda: dense(groups=3, t=1),
    "one direction": lambda: Outer(
        torch.randn(1, N, 1, T, O), DenseInputs(torch.randn(N, 1, T, 3)), True
    ),
    "indexed": indexed,
    "patches": patches,
    "patches, three uses": lambda: patches(3),
    "patches, flipped": lambda: patches(flipped=True),
    "summed": summed,
    "bias alone": bias_alone,
    "rows": rows_alone,
    "rows, streamed": rows_streamed,
}


def reference(form):
    """The rows by their definition."""
    if isinstance(form, (Rows, Stored)):
        return form.rows()
    if isinstance(form, Summed):
        total = torch.zeros(form.shape)
        for outer, layout in zip(form.outers, form.layouts, strict=True):
            total[..., layout.positions()] += reference(outer)
        return total
    x = [] if form.inputs is None else [form.inputs.dense()]
    if form.bias:
        x.append(torch.ones((*form.g.shape[1:4], 1)))
    return torch.einsum("rngto,ngti->rngoi", form.g, torch.cat(x, -1)).flatten(2)


@pytest.fixture(params=list(FORMS))
def form(request):
    return FORMS[request.param]()


@pytest.fixture(params=[2**23, 1])
def _tiles(request, monkeypatch):
    """All examples in one tile, and one example a tile."""
    for kind in (forms.Form, Rows, Stored, Outer, Summed):
        monkeypatch.setattr(kind, "tile_bytes", request.param, raising=False)
    monkeypatch.setattr(inputs, "TILE_NUMBERS", request.param)


@pytest.mark.usefixtures("_tiles")
def test_operations(form):
    J = reference(form)
    r, n, p = J.shape
    assert form.shape == (r, n, p)
    torch.testing.assert_close(form.rows(), J)
    torch.testing.assert_close(form.rows(1, 3), J[:, 1:3])
    torch.testing.assert_close(form.total(), J.sum((0, 1)))
    torch.testing.assert_close(form.sqsum(), J.square().sum((0, 1)))
    v, w = torch.randn(p, 2), torch.randn(r, n, 2)
    torch.testing.assert_close(form.jvp(v), J @ v)
    torch.testing.assert_close(form.vjp(w), torch.einsum("rnk,rnp->pk", w, J))
    torch.testing.assert_close(second_moment([form]), torch.einsum("rnp,rnq->pq", J, J))
    torch.testing.assert_close(form.examples(1, 3).rows(), J[:, 1:3])
    torch.testing.assert_close(form.direction(r - 1).rows(), J[r - 1 :])
    torch.testing.assert_close(grams.row_squares(form), J.square().sum(-1).mT)
    torch.testing.assert_close(grams.row_products(form), torch.einsum("rnp,snp->nrs", J, J))


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("way", ["auto", "pairs", "rows"])
@pytest.mark.parametrize("small", [False, True])
def test_inner_products_of_rows(form, way, small, monkeypatch):
    if small:
        for name in ("PAIR_NUMBERS", "ROW_BYTES", "HALVED"):
            monkeypatch.setattr(grams, name, 2)
    J = reference(form)
    r, n, _ = J.shape
    one, other = form.examples(0, n - 1), form.direction(0)
    full = torch.einsum("rnp,smp->nrms", J, J).flatten(2).flatten(0, 1)
    out = torch.ones(n * r, n * r)
    grams.add_products(form, form, "all", out, way)
    torch.testing.assert_close(out - 1, full)
    grams.add_products(form, form, "all", out, way, half=True)
    grams.mirror(out, 3)
    torch.testing.assert_close(out - 1, 2 * full)
    out = torch.zeros((n - 1) * r, n)
    grams.add_products(one, other, "all", out, way)
    torch.testing.assert_close(out, full.view(n, r, n, r)[:-1, :, :, 0].flatten(0, 1))
    out = torch.zeros(n, n)
    grams.add_products(form, form, "same", out, way)
    torch.testing.assert_close(out, torch.einsum("rnp,rmp->nm", J, J))
    out.zero_()
    grams.add_products(form, form, "same", out, way, half=True)
    torch.testing.assert_close(out.tril(), torch.einsum("rnp,rmp->nm", J, J).tril())


@pytest.mark.usefixtures("_tiles")
def test_joint_second_moment():
    a, b = dense(), rows_alone()
    J = torch.cat([reference(a), reference(b)], -1)
    torch.testing.assert_close(second_moment([a, b]), torch.einsum("rnp,rnq->pq", J, J))


def test_sum_along_vectors(form):
    J = reference(form).sum((0, 1))
    if isinstance(form, (Rows, Stored, Summed)):
        widths = [3, len(J) - 3]
        grid = J.view(1, -1)
    else:
        i = 0 if form.inputs is None else form.inputs.shape[3]
        widths = [width for width in (i, int(form.bias)) if width]
        grid = J.view(-1, sum(widths))
    vectors = [torch.randn(width) for width in widths]
    for mine, piece, v in zip(form.projected(vectors), grid.split(widths, 1), vectors, strict=True):
        torch.testing.assert_close(mine, piece @ v)


def test_kronecker_factors(form):
    if not isinstance(form, Outer):
        return
    x = torch.ones((*form.g.shape[1:4], 1))[..., :0] if form.inputs is None else form.inputs.dense()
    if form.bias:
        x = torch.cat([x, torch.ones((*x.shape[:-1], 1))], -1)
    right = torch.einsum("ngti,ngtj->gij", x, x)
    left = torch.einsum("rngto,rngtq->goq", form.g, form.g)
    diagonal = isinstance(form.inputs, IndexInputs)
    torch.testing.assert_close(
        form.input_moment(), right.diagonal(dim1=-2, dim2=-1) if diagonal else right
    )
    torch.testing.assert_close(form.output_moment(), left)
    torch.testing.assert_close(form.output_moment(into=left.clone()), 2 * left)
    torch.testing.assert_close(form.output_moment(diagonal=True), left.diagonal(dim1=-2, dim2=-1))
    if form.inputs is not None:
        torch.testing.assert_close(
            form.input_moment(diagonal=True), right.diagonal(dim1=-2, dim2=-1)
        )
    reduced = form.reduced()
    torch.testing.assert_close(reduced.g, form.g.sum(3, keepdim=True))
    if form.inputs is not None:
        torch.testing.assert_close(
            reduced.inputs.dense(), form.inputs.dense().mean(2, keepdim=True)
        )


@pytest.mark.parametrize("cached", [True, False])
def test_rotated_square_sums(form, cached, monkeypatch):
    if not isinstance(form, Outer) or form.inputs is None:
        return
    if not cached:
        monkeypatch.setattr(inputs, "CACHED_BYTES", 0)
    _, _, groups, _, o = form.g.shape
    Q = torch.linalg.qr(torch.randn(groups, o, o))[0]
    w = form.width
    P = torch.linalg.qr(torch.randn(groups, w, w))[0]
    J = reference(form).unflatten(-1, (groups, o, w))
    if isinstance(form.inputs, IndexInputs):
        expected = torch.einsum("rngoi,goa->rngai", J, Q)
        rotated = form.prepared(form.inputs.prepared(None, False), False, Q)
    else:
        expected = torch.einsum("rngoi,goa,gib->rngab", J, Q, P)
        rotated = form.prepared(form.inputs.prepared(P, form.bias), True, Q)
    torch.testing.assert_close(rotated.total(), expected.sum((0, 1)).flatten())
    torch.testing.assert_close(rotated.sqsum(), expected.square().sum((0, 1)).flatten())


@pytest.mark.usefixtures("_tiles")
def test_bias_cross():
    for form in (dense(), dense(groups=2), patches(), patches(3, flipped=True)):
        J = reference(form).unflatten(-1, (form.g.shape[2], O, form.width))
        expected = torch.einsum("rngoi,rngo->goi", J[..., :-1], J[..., -1])
        torch.testing.assert_close(form.bias_cross(), expected)
    with pytest.raises(ValueError, match="a weight and a bias"):
        bias_alone().bias_cross()


@settings(deadline=None, max_examples=60)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(*[st.tuples(st.integers(-1, 3), st.integers(-1, 3))] * 2),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    stride=st.sampled_from([1, 1, 2]),
    groups=st.sampled_from([1, 2]),
    size=st.tuples(st.integers(7, 8), st.integers(7, 8)),
    flipped=st.booleans(),
)
def test_patch_moments(kernel, padding, dilation, stride, groups, size, flipped):
    """By correlations or by patches, whichever is taken, the same moment."""
    geometry = Geometry(kernel, (stride, stride), padding, dilation, groups, flipped)
    for channels in (2, 16):
        images = torch.randn(2, channels * groups, *size, dtype=torch.float64)
        pad = [p for pair in reversed(padding) for p in pair]
        u = F.unfold(F.pad(images, pad), kernel, dilation=dilation, stride=stride)
        if flipped:
            u = u.unflatten(1, (-1, geometry.volume)).flip(2).flatten(1, 2)
        torch.testing.assert_close(unfold(images, geometry), u)
        u = u.unflatten(1, (groups, -1))
        expected = torch.einsum("ngit,ngjt->gij", u, u)
        for sums in _sums(geometry, images):
            for part in images.split(1):
                sums.add(part)
            torch.testing.assert_close(sums.moment(), expected)


def _sums(geometry, images):
    """All that a moment of patches can be made of."""
    shape = (images.shape[1] // geometry.groups, *images.shape[2:])
    kinds = [Products, Pixels] + [Correlations] * (set(geometry.stride) == {1})
    return [kind(geometry, shape, images) for kind in kinds]


def test_three_dimensional_patches():
    geometry = Geometry((2, 1, 3), (1, 1, 1), ((1, 1), (0, 0), (2, 1)), (1, 1, 2), 1)
    images = torch.randn(2, 8, 3, 4, 6)
    u = unfold(images, geometry)
    weight = torch.eye(8 * 6).reshape(48, 8, 2, 1, 3)
    padded = F.pad(images, (2, 1, 0, 0, 1, 1))
    expected = F.conv3d(padded, weight, dilation=(1, 1, 2)).flatten(2)
    torch.testing.assert_close(u, expected)
    for sums in _sums(geometry, images):
        sums.add(images)
        torch.testing.assert_close(
            sums.moment()[0], torch.einsum("nit,njt->ij", expected, expected)
        )


@pytest.mark.parametrize("shape", [(3, 1, 1, 700), (2, 1, 5, 300), (3, 2, 4, 5), (3, 2, 40, 90)])
def test_moments_of_any_shape(shape, monkeypatch):
    for layout in (torch.randn(shape), torch.randn(*shape[:2], shape[3], shape[2]).mT):
        for limit in (2**24, 0):
            monkeypatch.setattr("nngeo_lazy.jacobian.moments.SUMMED_BYTES", limit)
            x = torch.cat([layout, torch.ones(*layout.shape[:-1], 1)], -1)
            expected = torch.einsum("ngti,ngtj->gij", x, x)
            torch.testing.assert_close(moment(layout, True), expected)
            torch.testing.assert_close(moment(layout), expected[:, :-1, :-1])
            torch.testing.assert_close(moment(layout, True, expected.clone()), 2 * expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_weight_stored_around_its_outputs(groups):
    """A transposed convolution's: (in, out / groups, *kernel), and the grid of (channel, tap)."""
    weight, bias = torch.randn(4 * groups, 3, 5), torch.randn(3 * groups)
    start = 2
    pieces = (Piece(start, 20, True, 5), Piece(start + weight.numel(), 1))
    layout = Layout(groups, 3, pieces)
    flat = torch.cat([torch.zeros(start), weight.flatten(), bias]).unsqueeze(-1)
    by_group = weight.unflatten(0, (groups, 4)).transpose(1, 2).flatten(2)  # (G,o,i)
    grid = torch.cat([by_group, bias.view(groups, 3, 1)], -1)
    assert torch.equal(layout.gather(flat).squeeze(-1), grid.flatten())
    many = torch.randn(2, 3, len(flat), 2)
    gathered = layout.gather(many)
    assert torch.equal(gathered, many[:, :, layout.positions()])
    placed = [(0, many[:, :, :start]), *layout.scatter(gathered)]
    assert torch.equal(assemble(placed), many)
    moved = layout.shifted({start: 0, start + weight.numel(): weight.numel()})
    assert torch.equal(moved.gather(flat[start:]), layout.gather(flat))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 16])
def test_moments_of_small_images(size, stride, flipped, groups):
    """Few positions, and taps that see only padding."""
    geometry = Geometry((3, 3), (stride,) * 2, ((1, 1), (1, 1)), (1, 1), groups, flipped)
    x = PatchInputs(torch.randn(4, 16, size, size), geometry)
    dense = DenseInputs(x.dense().contiguous())
    for bias in (False, True):
        once = x.moment(bias)
        torch.testing.assert_close(once, dense.moment(bias))
        torch.testing.assert_close(x.moment(bias, once.clone()), 2 * once)
        assert torch.equal(once == 0, dense.moment(bias) == 0)  # which decompositions leave out
        grown = x.grown(bias, x.grown(bias, None))
        torch.testing.assert_close(grown.finish(once.clone()), 3 * once)
        other = PatchInputs(torch.randn(4, 16, size + 1, size + 1), geometry)
        assert other.grown(bias, grown) is not grown


def test_moments_of_patches_that_are_all_padding():
    geometry = Geometry((2, 2), (20, 20), ((5, 5), (5, 5)), (1, 1), 2)
    x = PatchInputs(torch.randn(4, 16, 2, 2), geometry)
    for bias in (False, True):
        assert torch.equal(x.moment(bias), DenseInputs(x.dense()).moment(bias))


def test_decompositions_leave_out_rows_of_zeros():
    x = torch.randn(70, 100)
    x[:, 10:40] = 0
    for matrix in (x.mT @ x, (x.mT @ x).unsqueeze(0), torch.zeros(80, 80)):
        values, vectors = eigh(matrix)
        n = matrix.shape[-1]
        rebuilt = vectors @ (values.unsqueeze(-1) * vectors.mT)
        torch.testing.assert_close(rebuilt, matrix)
        torch.testing.assert_close(vectors.mT @ vectors, torch.eye(n).expand_as(matrix))
        assert bool((values.diff(dim=-1) >= 0).all())
