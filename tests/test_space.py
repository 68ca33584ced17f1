"""Parameter spaces, selectors and layouts."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nngeo_lazy.errors import DataError, SpaceMismatchError
from nngeo_lazy.layout import Layout, Piece, assemble
from nngeo_lazy.selectors import select, space_of
from nngeo_lazy.space import ParamSpace


def net():
    return nn.Sequential(
        nn.Linear(3, 2), nn.ReLU(), nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4))
    )


# --- spaces ---------------------------------------------------------------------------------------


def test_order_is_that_of_named_parameters():
    model = net()
    space = ParamSpace.of(model)
    flat = nn.utils.parameters_to_vector(model.parameters())
    assert space.names == tuple(dict(model.named_parameters()))
    assert torch.equal(space.values(model), flat)
    assert len(space) == flat.numel()
    assert space.values(model).requires_grad


def test_ravel_and_unravel_with_leading_dimensions():
    space = ParamSpace.of(net())
    v = torch.randn(2, 5, len(space))
    parts = space.unravel(v)
    assert parts["0.weight"].shape == (2, 5, 2, 3)
    assert torch.equal(space.ravel(parts), v)
    del parts["0.bias"]
    with pytest.raises(SpaceMismatchError, match=r"missing: \['0.bias'\]"):
        space.ravel(parts)
    with pytest.raises(SpaceMismatchError, match=r"0.bias of shape \(..., 2\), got \(3,\)"):
        space.ravel({**space.unravel(v[0, 0]), "0.bias": torch.ones(3)})
    with pytest.raises(SpaceMismatchError, match="last dimension of"):
        space.unravel(torch.ones(3))


def test_a_parameter_that_is_one_number():
    model = nn.Module()
    model.scale, model.shift = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.randn(2))
    space = ParamSpace.of(model)
    v = torch.randn(3)
    assert space.unravel(v)["scale"].shape == ()
    assert space.unravel(torch.stack([v, v]))["scale"].shape == (2,)
    assert torch.equal(space.ravel(space.unravel(v)), v)
    space.assign_(model, v)
    assert torch.equal(space.values(model), v)


def test_reads_and_writes_of_a_model():
    model = net()
    space = ParamSpace.of(model)
    before = space.values(model).detach().clone()
    v = torch.randn(len(space))
    space.add_(model, v, alpha=0.5)
    torch.testing.assert_close(space.values(model), before + 0.5 * v)
    space.assign_(model, space.unravel(before))
    assert torch.equal(space.values(model), before)
    assert (space.grad(model) == 0).all()
    assert all(p.grad is None for p in model.parameters())
    space.assign_grad_(model, v)
    assert torch.equal(space.grad(model), v)
    with pytest.raises(SpaceMismatchError, match="expected one vector"):
        space.assign_(model, v.expand(2, -1))
    with pytest.raises(SpaceMismatchError, match="the model has no parameter"):
        space.values(nn.Linear(2, 2))


def test_wrapped_models_have_equal_spaces():
    model = net()
    wrapped = nn.DataParallel(model)
    space, other = ParamSpace.of(model), ParamSpace.of(wrapped)
    assert space == other
    assert hash(space) == hash(other)
    assert torch.equal(space.values(wrapped), space.values(model))
    assert other.resolve("0.weight") == "module.0.weight"
    parts = space.unravel(torch.arange(float(len(space))))
    assert torch.equal(other.ravel(parts), torch.arange(float(len(space))))
    assert space != ParamSpace.of(nn.Linear(3, 2))
    assert space != "space"


def test_vectors():
    space = ParamSpace({"a": (2, 3), "b": ()}, dtype=torch.float64)
    assert space.zeros().shape == (7,)
    assert space.randn().dtype == torch.float64
    assert space.randn(3).shape == (7, 3)
    assert torch.equal(space.eye(), torch.eye(7, dtype=torch.float64))
    assert space.to(torch.float32).zeros().dtype == torch.float32
    assert space.slices["b"] == slice(6, 7)


def test_subspace_is_in_the_order_of_the_space():
    space = ParamSpace({"a": (2,), "b": (3,), "c": (1,)})
    assert space.subspace(["c", "a"]).names == ("a", "c")
    with pytest.raises(SpaceMismatchError, match="no parameter 'd'"):
        space.subspace(["d"])


def test_what_is_not_a_space():
    model = net()
    with pytest.raises(SpaceMismatchError, match=r"no parameter \['nothing'\]"):
        ParamSpace.of(model, ["nothing"])
    with pytest.raises(DataError, match=r"at least one trainable.*requires_grad_\(\)"):
        ParamSpace.of(model.requires_grad_(False))
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(DataError, match=r"one dtype.*0.weight on torch.float32, 1.weight"):
        ParamSpace.of(mixed)
    devices = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(DataError, match="one device"):
        ParamSpace.of(devices)


def test_space_does_not_keep_its_model_alive_and_pickles():
    model = net()
    space = ParamSpace.of(model)
    again = pickle.loads(pickle.dumps(space))
    assert again == space
    assert select(again, nn.LayerNorm) == ("2.1.weight", "2.1.bias")
    del model
    with pytest.raises(SpaceMismatchError, match="its model is gone"):
        select(space, lambda name, p: True)


# --- selectors ------------------------------------------------------------------------------------


def test_selectors():
    model = net()
    space = ParamSpace.of(model)
    assert select(space, "0.weight") == ("0.weight",)
    assert select(space, "2.0") == ("2.0.weight", "2.0.bias")
    assert select(space, "2") == space.names[2:]
    assert select(space, "*.bias") == ("0.bias", "2.0.bias", "2.1.bias")
    assert select(space, model[2][1]) == ("2.1.weight", "2.1.bias")
    assert select(space, nn.Linear) == ("0.weight", "0.bias", "2.0.weight", "2.0.bias")
    assert select(space, lambda name, p: p.dim() == 2) == ("0.weight", "2.0.weight")
    assert select(space, ["2.0.bias", "0"]) == ("0.weight", "0.bias", "2.0.bias")
    assert select(space, model) == space.names


def test_selectors_that_match_nothing():
    model = net()
    space = ParamSpace.of(model)
    with pytest.raises(SpaceMismatchError, match=r"did you mean \['0.weight'"):
        select(space, "0.weigth")
    for selector in (nn.Conv2d, nn.Linear(1, 1), [], ["0", "9"], lambda name, p: False):
        with pytest.raises(SpaceMismatchError, match="matches no parameter"):
            select(space, selector)
    with pytest.raises(SpaceMismatchError, match="expected a selector"):
        select(space, 3)
    bare = ParamSpace({"a": (2,)})
    with pytest.raises(SpaceMismatchError, match="does not know the modules"):
        select(bare, nn.Linear)


def test_space_of_a_selector():
    model = net()
    model[0].requires_grad_(False)
    assert space_of(model).names[0] == "2.0.weight"
    assert space_of(model, "0").names == ("0.weight", "0.bias")  # chosen, whatever its flag


# --- layouts --------------------------------------------------------------------------------------


@st.composite
def layouts(draw):
    """Layouts that partition a flat vector, in any order."""
    sizes = st.integers(1, 3)
    start, made = 0, []
    for _ in range(draw(st.integers(1, 3))):
        transposed = draw(st.booleans())
        groups = 1 if transposed else draw(sizes)
        rows, pieces = draw(sizes), []
        for _ in range(draw(st.integers(1, 2))):
            width = draw(sizes)
            pieces.append(Piece(start, width, transposed))
            start += width * groups * rows
        made.append(Layout(groups, rows, tuple(draw(st.permutations(pieces)))))
    return start, draw(st.permutations(made))


@given(layouts())
def test_gather_and_scatter_are_inverse(drawn):
    size, made = drawn
    v = torch.randn(2, size, 3)
    placed = [piece for layout in made for piece in layout.scatter(layout.gather(v))]
    assert torch.equal(assemble(placed), v)
    for layout in made:
        assert torch.equal(layout.gather(v), v[:, layout.positions()])
        assert layout.size == layout.positions().numel()
    everything = torch.cat([layout.positions() for layout in made])
    assert torch.equal(everything.sort().values, torch.arange(size))


def test_a_weight_with_its_bias_is_a_grid():
    weight, bias = torch.randn(2, 3), torch.randn(2)
    layout = Layout(1, 2, (Piece(0, 3), Piece(6, 1)))
    flat = torch.cat([weight.reshape(-1), bias]).unsqueeze(-1)
    grid = layout.gather(flat).reshape(2, 4)
    assert torch.equal(grid, torch.cat([weight, bias[:, None]], 1))


def test_a_transposed_weight():
    weight = torch.randn(3, 2)  # stored (in, out)
    layout = Layout(1, 2, (Piece(0, 3, transposed=True),))
    grid = layout.gather(weight.reshape(-1, 1)).reshape(2, 3)
    assert torch.equal(grid, weight.mT)


def test_shifted_layout():
    layout = Layout(1, 2, (Piece(10, 3), Piece(20, 1)))
    assert layout.shifted({10: 0, 20: 6}) == Layout(1, 2, (Piece(0, 3), Piece(6, 1)))
