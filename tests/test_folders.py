"""Operators as folders: blocks that are opened when they are needed, and indices that are whole."""

import json
import os
import pickle
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import nngeo_lazy as ng
from nngeo_lazy import folders
from nngeo_lazy.errors import DataError, MissingFileError
from nngeo_lazy.operators import DenseLinearOperator, StoredLinearOperator, rules
from nngeo_lazy.testing import check_operator

from cases import close
from operators import examples

pytest.importorskip("safetensors", reason="the extra `folders`")

# Numbers are kept bit by bit, but not how they lie in memory, which decides how products round.
ROUNDING = 1e-14


@pytest.fixture
def F():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(8, 3)).double()
    x, y = torch.randn(6, 1, 3, 3, dtype=torch.float64), torch.arange(6) % 3
    chosen = ng.representations.Mixed("ekfac", {"0": "quasi_diagonal"})
    return ng.FIM(model, (x, y), chosen)


@pytest.fixture
def folder(F, tmp_path):
    ng.save(F, f"{tmp_path}/F/")
    return tmp_path / "F"


@pytest.mark.parametrize("name", examples.EVERY)
def test_round_trip_of_every_class(name, tmp_path):
    op = examples.EVERY[name]()
    ng.save(op, f"{tmp_path}/F/")
    for options in ({}, {"mmap": True}):
        back = ng.load(tmp_path / "F", **options)
        assert type(back) is type(op)
        for there, kept in zip(back.representation(), op.representation(), strict=True):
            assert torch.equal(there, kept)
        close(back.to_dense(), op.to_dense(), ROUNDING)
        assert repr(back.report()) == repr(op.report())
    lazy = ng.load(tmp_path / "F", lazy=True)
    assert lazy.space == op.space
    close(lazy.to_dense(), op.to_dense(), ROUNDING)
    check_operator(lazy, examples.matrix(op), symmetric=name not in ("product", "jacobian"))


def test_a_file_is_mapped(F, tmp_path):
    ng.save(F, tmp_path / "F.pt")
    back = ng.load(tmp_path / "F.pt", mmap=True)
    close(back.to_dense(), F.to_dense(), ROUNDING)
    back.members[0].representation()[0].zero_()  # of this process alone
    close(ng.load(tmp_path / "F.pt").to_dense(), F.to_dense(), ROUNDING)


def test_blocks_are_opened_when_they_are_needed(F, folder, monkeypatch):
    lazy = ng.load(folder, lazy=True, space=F.space)
    assert all(isinstance(member, StoredLinearOperator) for member in lazy.members)
    assert all(t.numel() == 0 for t in lazy.representation())
    assert lazy.members[1]._kind() == f"stored {F.members[1]._kind()}"
    opened = []
    read = folders.Folder.tensors
    monkeypatch.setattr(
        folders.Folder, "tensors", lambda self, keys: opened.append(keys) or read(self, keys)
    )
    assert str(lazy.report()).count("stored") == 4
    assert opened == []
    close(lazy.block("2").to_dense(), F.block("2").to_dense(), ROUNDING)
    assert {key.split("[")[0] for keys in opened for key in keys} == {"2"}


def test_what_is_made_of_stored_blocks_is_stored(F, folder):
    lazy, v = ng.load(folder, lazy=True), F.space.randn(2)
    made = {
        "damped": lambda F: F.damped(0.3),
        "damped by a selector": lambda F: F.damped({"0": 0.1, "2": 0.2}),
        "inverse": lambda F: F.inverse(damping=0.3),
        "power": lambda F: F.block("2").damped(0.3).power(-0.5),
        "pinv": lambda F: F.block("2").pinv(),
        "scaled": lambda F: 2.0 * F,
        "block": lambda F: F.block("2.weight"),
        "transposed": lambda F: F.mT,
        "sum": lambda F: F + F,
        "in float32": lambda F: F.to(torch.float32).to(torch.float64),
    }
    for name, make in made.items():
        stored, known = make(lazy), make(F)
        vector = v[: stored.shape[-1]]
        assert all(t.numel() == 0 for t in stored.representation()), name
        close(stored @ vector, known @ vector, 1e-6 if "float32" in name else 1e-12)
    close(lazy.solve(v, damping=0.1), F.solve(v, damping=0.1), 1e-12)
    damping = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    slopes = [
        torch.autograd.grad(op.solve(v, damping=damping).sum(), damping)[0] for op in (lazy, F)
    ]
    close(*slopes, 1e-12)
    assert ng.merge([lazy, F]).num_examples == 12
    x, y = torch.randn(4, 1, 3, 3, dtype=torch.float64), torch.arange(4) % 3
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(8, 3)).double()
    ekfac = ng.FIM(model, (x, y), "ekfac")
    ng.save(ekfac, f"{folder.parent}/E/")
    fresh = [
        ng.update_diag(op, model, (x, y)) for op in (ekfac, ng.load(folder.parent / "E", lazy=True))
    ]
    close(fresh[0].to_dense(), fresh[1].to_dense(), ROUNDING)
    again = pickle.loads(pickle.dumps(lazy))
    close(again @ v, F @ v, ROUNDING)


def test_a_folder_is_replaced_when_the_new_one_is_whole(F, folder, monkeypatch):
    first = set(os.listdir(folder))
    lazy = ng.load(folder, lazy=True)
    write = folders._write
    monkeypatch.setattr(folders, "_write", lambda *args: write(*args) / 0)
    with pytest.raises(ZeroDivisionError):
        ng.save(2.0 * F, folder)
    close(ng.load(folder).to_dense(), F.to_dense(), ROUNDING)
    close(lazy.to_dense(), F.to_dense(), ROUNDING)
    monkeypatch.undo()
    ng.save(2.0 * F, folder)
    assert len(os.listdir(folder)) == len(first)  # what was left behind is gone as well
    close(ng.load(folder).to_dense(), 2 * F.to_dense(), ROUNDING)
    with pytest.raises(MissingFileError, match=r"written anew since it was loaded. Load it again"):
        lazy.to_dense()


def test_files_are_bounded_and_split_no_block(F, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "FILE_BYTES", 1)
    ng.save(F, f"{tmp_path}/F/")
    index = json.loads((tmp_path / "F" / "index.json").read_text())
    assert len(index["files"]) == len(F.members)
    for k, name in enumerate(F.names):
        own = {
            file for key, (file, *_) in index["tensors"].items() if key.startswith(f"{name}[{k}]")
        }
        assert len(own) == 1
    close(ng.load(tmp_path / "F").to_dense(), F.to_dense(), ROUNDING)


def _blocks(folder):
    return next(name for name in folder.iterdir() if name.suffix == ".safetensors")


def test_damaged_folders_are_refused(F, folder):
    block, index = _blocks(folder), folder / "index.json"
    whole, text = block.read_bytes(), index.read_text()
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    refusals = [
        (block, whole[:-8], r"bytes and was saved with .*cut off or replaced"),
        (block, bytes(flipped), "the tensor .* has another checksum than when it was saved"),
        (block, b"\0" * len(whole), "is damaged"),
        (index, text.replace('"num_examples": 6', '"num_examples": 7'), "it has another checksum"),
        (index, text[:-20], "is damaged, or none of ng.save"),
        (index, "{}", "an index of something else"),
        (index, text.replace('"version": 2', '"version": 3'), "expected version 2"),
    ]
    for path, content, words in refusals:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(DataError, match=words):
            ng.load(folder)
        block.write_bytes(whole)
        index.write_text(text)
        close(ng.load(folder).to_dense(), F.to_dense(), ROUNDING)  # the remedy: a whole copy


def test_a_damaged_block_is_found_when_it_is_opened(F, folder):
    lazy, block = ng.load(folder, lazy=True), _blocks(folder)
    data = bytearray(block.read_bytes())
    data[-3] ^= 1
    block.write_bytes(bytes(data))
    with pytest.raises(DataError, match="has another checksum"):
        lazy.to_dense()
    with pytest.raises(DataError, match="has another checksum"):
        lazy.to_dense()
    mapped = ng.load(folder, mmap=True)  # says that it does not look
    assert mapped.shape == F.shape


def test_every_truncation_is_named(folder):
    for path in list(folder.iterdir()):
        whole = path.read_bytes()
        for k in range(20):
            path.write_bytes(whole[: len(whole) * k // 20])
            with pytest.raises(DataError):
                ng.load(folder)
        path.write_bytes(whole)
    ng.load(folder)


def test_a_folder_that_is_being_written(F, folder):
    index = folder / "index.json"
    text = index.read_text()
    index.unlink()
    with pytest.raises(DataError, match=r"still being written.*save the operator again"):
        ng.load(folder)
    index.write_text(text)
    block = _blocks(folder)
    block.rename(folder / "elsewhere")
    with pytest.raises(MissingFileError, match=f"lacks its file '{block.name}'"):
        ng.load(folder)
    (folder / "elsewhere").rename(block)
    index.unlink()
    ng.save(F, folder)  # the remedy
    close(ng.load(folder).to_dense(), F.to_dense(), ROUNDING)


def test_foreign_folders_are_refused(F, tmp_path):
    with pytest.raises(MissingFileError, match=r"there is none at .*nowhere.: check the path"):
        ng.load(f"{tmp_path}/nowhere/")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"has no index.json: check the path"):
        ng.load(tmp_path)
    with pytest.raises(DataError, match=r"of the operator's own, but .* holds \['notes.txt'\]"):
        ng.save(F, tmp_path)
    with pytest.raises(DataError, match=r"notes.txt' is a file: take another name"):
        ng.save(F, f"{tmp_path}/notes.txt/")
    ng.save(F, f"{tmp_path}/new/folder/")
    assert ng.load(f"{tmp_path}/new/folder/").num_examples == 6


def test_an_index_that_was_altered(F, folder):
    index = json.loads((folder / "index.json").read_text())
    first = next(iter(index["tensors"]))

    def altered(change):
        other = json.loads(json.dumps(index))
        change(other)
        other["checksum"] = folders._checksum(other)
        (folder / "index.json").write_text(json.dumps(other))

    cases = [
        (lambda i: i["tensors"].pop(first), f"lacks the tensors [{first!r}]"),
        (lambda i: i["tensors"].update(more=i["tensors"][first]), "extra tensors ['more']"),
        (lambda i: i["tensors"][first].__setitem__(1, "torch.float32"), "another checksum"),
        (lambda i: i.pop("operator"), "malformed"),
        (lambda i: i["operator"].update({"class": "Evil"}), "unknown operator 'Evil'"),
    ]
    for change, words in cases:
        altered(change)
        for options in ({}, {"lazy": True}):
            with pytest.raises(DataError, match=re.escape(words)):
                ng.load(folder, **options).to_dense()
    altered(lambda i: i["tensors"][first].__setitem__(1, "torch.nonsense"))
    with pytest.raises(DataError, match=r"numbers of an unknown type 'torch.nonsense'"):
        ng.load(folder, lazy=True)


def test_options_that_do_not_fit(F, folder, tmp_path, monkeypatch):
    ng.save(F, tmp_path / "F.pt")
    with pytest.raises(DataError, match=r"lazy=True opens blocks of a folder.*ng.save\(F, 'F/'\)"):
        ng.load(tmp_path / "F.pt", lazy=True)
    with pytest.raises(DataError, match="mmap=True needs the path of a file, got dict"):
        ng.load(F.state_dict(), mmap=True)
    with pytest.raises(DataError, match="expected map_location to be a device for a folder"):
        ng.load(folder, map_location={"cpu": "cpu"})
    assert ng.load(folder, map_location="cpu").device.type == "cpu"
    monkeypatch.setattr(folders, "_safetensors", None)
    for call in (lambda: ng.load(folder), lambda: ng.save(F, folder)):
        with pytest.raises(ImportError, match=r"needs safetensors: pip install .nngeo_lazy\[fol"):
            call()
    ng.save(F, tmp_path / "F.pt")  # the remedy that needs no package


def test_tensors_that_share_memory(tmp_path):
    matrix = torch.randn(3, 3)
    matrix = matrix + matrix.mT
    op = rules.as_operator(matrix)
    both = ng.operators.BlockDiagonalLinearOperator(op, rules.as_operator(matrix[:2, :2]), op)
    ng.save(both, f"{tmp_path}/F/")
    close(ng.load(tmp_path / "F").to_dense(), both.to_dense(), ROUNDING)


MEMORY = """
import resource, sys, torch, nngeo_lazy as ng
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
F = ng.load(sys.argv[1], lazy=True)
total = float((F @ torch.ones(len(F.members) * 1024)).sum())
assert total == float(F.trace()) == 1024 * 24 * 25 / 2
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_one_block_at_a_time_is_in_memory(tmp_path):
    members = [DenseLinearOperator(torch.eye(1024) * (k + 1)) for k in range(24)]  # 4 MiB each
    ng.save(ng.operators.BlockDiagonalLinearOperator(*members), f"{tmp_path}/F/")
    run = [sys.executable, "-c", MEMORY, f"{tmp_path}/F/"]
    found = subprocess.run(run, capture_output=True, text=True, check=True)
    assert int(found.stdout) < 40 * 1024  # KiB; all blocks are 96 MiB
