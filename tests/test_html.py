"""What a notebook shows: tables with bars, and text that is escaped."""

import re

import pytest
import torch
from torch import nn

import nngeo_lazy as ng
from nngeo_lazy.html import bar, page, table


@pytest.fixture(scope="module")
def data():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    return model, torch.randn(9, 4), torch.randint(3, (9,))


def cells(text):
    """The rows of a table, without markup."""
    rows = re.findall(r"<tr>(.*?)</tr>", text)
    return [[re.sub("<.*?>", "", c) for c in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]


def widths(text):
    return [float(w) for w in re.findall(r"width:([\d.]+)em", text)]


def test_an_operator_shows_its_blocks_and_their_bytes(data):
    model, x, y = data
    F = ng.FIM(model, (x, y), "kfac")
    text = F._repr_html_()
    head, *rows = cells(text)
    assert head == ["layer", "block", "parameters", "bytes"]
    assert [row[0] for row in rows] == ["0", "1", "2"]
    assert [row[2] for row in rows] == ["30", "12", "21"]
    taken = dict.fromkeys("012", 0)
    for row in F.report():
        taken[row.layer] += row.bytes
    assert widths(text) == [round(6 * b / max(taken.values()), 2) for b in taken.values()]
    assert repr(F) in re.sub("<.*?>", "", text).replace("&amp;", "&")


@pytest.mark.parametrize("representation", ["dense", "ekfac", "low_rank", "implicit", "factored"])
def test_every_operator_has_one(data, representation):
    model, x, y = data
    F = ng.FIM(model, (x, y), representation)
    for each in (F, F.damped(0.1), F.inverse(damping=0.1), F + F, F.block("0"), ng.NTK(model, x)):
        assert type(each).__name__ in each._repr_html_()
    assert "JacobianLinearOperator" in ng.Jacobian(model, x)._repr_html_()


def test_reports_and_plans_show_every_row(data):
    model, x, y = data
    for rows in (ng.FIM(model, (x, y), "kfac").report(), ng.plan(ng.FIM, model, (x, y), "kfac")):
        text = rows._repr_html_()
        head, *lines = cells(text)
        assert [line[0] for line in lines] == [row.parameter for row in rows]
        assert "bytes" in head
        assert max(widths(text)) == 6.0
    assert "1 pass over 1 batch" in text


def test_results_show_their_attributes(data):
    model, x, y = data
    F = ng.FIM(model, (x, y), "dense")
    for found in (
        ng.eigsh(F, 2),
        ng.trace(F),
        ng.solve(F, torch.ones(len(F.space)), damping=0.1),
        ng.svds(F, 2),
        ng.spectral_density(F, probes=2, steps=5, seed=0),
    ):
        text = found._repr_html_()
        assert type(found).__name__ in text
        assert found.__match_args__[0] in text


def test_text_is_escaped():
    assert "<b>" not in page("<b>", table(("<b>",), [("<b>",)]))
    assert "&lt;b&gt;" in bar(1, 2, "<b>")
    assert widths(bar(0, 0, "")) == [0.0]
