"""Saving and loading: tensors and plain data, and refusals that name what does not fit."""

import io
import pickle
import re

import pytest
import torch
from fuzz import files as damage
from torch import nn

import nngeo_lazy as ng
from nngeo_lazy.errors import DataError, SpaceMismatchError, UnsupportedLayerError
from nngeo_lazy.operators import rules
from nngeo_lazy.representations import Mixed
from nngeo_lazy.testing import check_operator

from operators import examples


@pytest.fixture
def F():
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(8, 3))
    x, y = torch.randn(6, 1, 3, 3), torch.randint(3, (6,))
    return ng.FIM(model, (x, y), Mixed("ekfac", {"0": "quasi_diagonal"}))


@pytest.mark.parametrize("name", examples.EVERY)
def test_round_trip_of_every_class(name, tmp_path):
    op = examples.EVERY[name]()
    ng.save(op, tmp_path / "F.pt")
    back = ng.load(tmp_path / "F.pt")
    assert type(back) is type(op)
    assert torch.equal(back.to_dense(), op.to_dense())
    assert back.space == op.space
    assert back.num_examples == op.num_examples
    assert repr(back.report()) == repr(op.report())
    check_operator(back, examples.matrix(op), symmetric=name not in ("product", "jacobian"))


def test_what_is_known_comes_back(F, tmp_path):
    ng.save(F, tmp_path / "F.pt")
    back = ng.load(tmp_path / "F.pt", map_location="cpu", space=F.space)
    assert back.info.quantity == F.info.quantity
    assert back.info.origins == F.info.origins
    assert (back.names, back.layouts) == (F.names, F.layouts)
    assert list(back.blocks) == list(F.blocks)
    assert ng.merge([back, F]).num_examples == 12
    assert back.block("2").shape == (27, 27)
    with pytest.raises(SpaceMismatchError, match="does not know the modules"):
        back.block(nn.Linear)


def test_files_hold_nothing_but_tensors_and_plain_data(F):
    def plain(value):
        if isinstance(value, dict):
            return all(isinstance(k, str) and plain(v) for k, v in value.items())
        if isinstance(value, list):
            return all(map(plain, value))
        return value is None or isinstance(value, (str, int, float, torch.Tensor))

    state = F.state_dict()
    assert plain(state)
    assert (state["version"], state["parameters"]) == (1, list(F.space.names))
    assert state["conventions"]["parameter order"] == "named_parameters, each row-major"
    assert "quasi-diagonal" in state["representation"]


def test_views_are_saved_without_what_they_look_into(tmp_path):
    big = torch.randn(1000, 1000)
    ng.save(rules.as_operator(big[:3, :3] + big[:3, :3].mT), tmp_path / "small.pt")
    ng.save(rules.as_operator(big[:3, :3]), tmp_path / "view.pt")
    assert (tmp_path / "view.pt").stat().st_size < 2 * (tmp_path / "small.pt").stat().st_size


def test_an_open_file_and_a_state(F):
    buffer = io.BytesIO()
    ng.save(F, buffer)
    buffer.seek(0)
    assert torch.equal(ng.load(buffer).to_dense(), F.to_dense())
    for location in (None, "cpu", {"cpu": "cpu"}):
        back = ng.load(F.state_dict(), map_location=location)
        assert torch.equal(back.to_dense(), F.to_dense())


def test_a_loaded_operator_is_a_value(F):
    state = F.state_dict()
    back, trace = ng.load(state), float(F.trace())
    for tensor in state["tensors"].values():
        tensor.mul_(2)
    assert float(back.trace()) == pytest.approx(trace)


def _altered(F, **changes):
    return {**F.state_dict(), **changes}


def test_refusals(F, tmp_path):
    tensors = F.state_dict()["tensors"]
    first = next(iter(tensors))
    less = {key: t for key, t in tensors.items() if key != first}
    wrong = {**tensors, first: torch.zeros(2, 3)}
    cases = [
        (_altered(F, version=2), "expected version 1 of the format, got version 2"),
        (_altered(F, format="other"), "written by ng.save"),
        ({}, "written by ng.save"),
        (_altered(F, tensors=less), re.escape(f"lacks the tensor '{first}'")),
        (_altered(F, tensors={**tensors, "more": torch.ones(1)}), r"extra tensors \['more'\]"),
        (_altered(F, tensors=wrong), "do not fit together"),
        ({k: v for k, v in F.state_dict().items() if k != "tensors"}, r"lacks \['tensors'\]"),
    ]  # fmt: skip
    for state, words in cases:
        with pytest.raises(DataError, match=words):
            ng.load(state)
    unknown = F.state_dict()
    unknown["operator"]["class"] = "Evil"
    with pytest.raises(DataError, match="unknown operator 'Evil'"):
        ng.load(unknown)
    empty = F.state_dict()
    for part in ("operator", "info"):
        holder = empty if part == "operator" else empty["operator"]
        whole, holder[part] = holder[part], {}
        with pytest.raises(DataError, match="the file is malformed"):
            ng.load(empty)
        holder[part] = whole
    for nothing in (3, b"abc"):
        with pytest.raises(DataError, match="it cannot be read"):
            ng.load(nothing)
    (tmp_path / "noise.pt").write_bytes(b"no file of ours")
    with pytest.raises(DataError, match="it cannot be read"):
        ng.load(tmp_path / "noise.pt")
    for error in (FileNotFoundError, DataError):
        with pytest.raises(error, match=r"there is none at .*nowhere.pt.*check the path"):
            ng.load(tmp_path / "nowhere.pt")
    with pytest.raises(DataError, match=r"has no index.json: check the path"):
        ng.load(tmp_path)


def test_another_space_is_refused(F):
    other = ng.ParamSpace({"0.weight": (2, 1, 2, 2), "0.bias": (3,), "head": (5,)})
    with pytest.raises(SpaceMismatchError) as caught:
        ng.load(F.state_dict(), space=other)
    message = str(caught.value)
    assert "missing ['head']" in message
    assert "extra ['2.weight', '2.bias']" in message
    assert "0.bias (2,), not (3,)" in message
    order = ng.ParamSpace(dict(reversed(list(zip(F.space.names, F.space.shapes, strict=True)))))
    with pytest.raises(SpaceMismatchError, match="in another order"):
        ng.load(F.state_dict(), space=order)
    bare = rules.as_operator(torch.eye(3))
    with pytest.raises(SpaceMismatchError, match="a bare matrix"):
        ng.load(bare.state_dict(), space=other)
    state = ng.identity(F.space).state_dict()
    state["operator"]["info"]["space"]["more"] = [[2], "more"]
    with pytest.raises(SpaceMismatchError, match="its tensors are over 37"):
        ng.load(state)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    with (tmp_path / "evil.pt").open("wb") as file:
        pickle.dump({"format": Evil()}, file)
    torch.save({"format": Evil()}, tmp_path / "evil2.pt")
    for name in ("evil.pt", "evil2.pt"):
        with pytest.raises(DataError, match="it cannot be read"):
            ng.load(tmp_path / name)


def test_what_is_no_tensor_cannot_be_saved():
    from linear_operator.operators import ToeplitzLinearOperator

    with pytest.raises(UnsupportedLayerError, match="ForeignLinearOperator cannot be saved"):
        rules.as_operator(ToeplitzLinearOperator(torch.tensor([2.0, 1.0]))).state_dict()


def test_damaged_files_are_refused():
    seen = damage.truncated(40) + damage.flipped(300)
    assert set(seen) == {"named", "same"}, seen
    assert seen["named"] > 150
    F, raw = damage.subject("dense")
    where = raw.index(F.to_dense().numpy().tobytes()[:16])
    data = bytearray(raw)
    data[where] ^= 1
    with pytest.raises(DataError, match=r"another checksum.*Take another copy of it, or build"):
        ng.load(io.BytesIO(bytes(data)))
    data[where] ^= 1  # the remedy: an intact copy
    assert torch.equal(ng.load(io.BytesIO(bytes(data))).to_dense(), F.to_dense())


def test_an_interrupted_save_keeps_the_old_file(tmp_path):
    assert damage.interrupted(12, tmp_path) == {"whole": 12, "left behind": 0}
    assert damage.killed(1, tmp_path) == {"whole": 1}


def test_a_failing_save_keeps_the_old_file(tmp_path, monkeypatch):
    F = rules.as_operator(torch.eye(2))
    path = tmp_path / "F.pt"
    ng.save(F, path)
    path.chmod(0o640)
    link = tmp_path / "link.pt"
    link.symlink_to(path)
    ng.save(F + F, link)  # through the link, with the mode of the file
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert float(ng.load(path).trace()) == 4

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        ng.save(F, path)
    assert float(ng.load(path).trace()) == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["F.pt", "link.pt"]


def test_blocks_must_tile_the_space(F):
    for place, value in ((0, 3), (1, 3)):
        state = F.state_dict()
        state["operator"]["info"]["blocks"][0][3][0][place] = value
        with pytest.raises(DataError, match="blocks that follow each other"):
            ng.load(state)


def test_plain_data_of_another_type_are_refused(F):
    for key, value in (
        ("num_examples", "many"),
        ("quantity", {"matrix": [1]}),
        ("origins", {"a": [1, 2, 3, 4]}),
    ):
        state = F.state_dict()
        state["operator"]["info"][key] = value
        with pytest.raises(DataError, match=f"the file is malformed: .*{key}"):
            ng.load(state)
    for tensors in (None, [1], "x", {"a": 1}):
        with pytest.raises(DataError, match="expected its tensors by name"):
            ng.load(_altered(F, tensors=tensors))
    with pytest.raises(DataError, match="holds \\['chequesum'\\], which no release writes"):
        ng.load(_altered(F, chequesum="0"))


def test_what_is_no_operator_cannot_be_saved(tmp_path):
    model = nn.Linear(2, 2)
    with pytest.raises(DataError, match=r"got Linear: save a model with torch.save") as caught:
        ng.save(model, tmp_path / "m.pt")
    assert "model.state_dict()" in str(caught.value)
    torch.save(model.state_dict(), tmp_path / "m.pt")  # the remedy
