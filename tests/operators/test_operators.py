"""Every member of every class against the dense matrix."""

import pytest

from nngeo_lazy.testing import check_operator

from . import examples


@pytest.mark.parametrize("name", examples.EVERY)
def test_every_member(name):
    op = examples.EVERY[name]()
    check_operator(op, examples.matrix(op), symmetric=name not in ("product", "jacobian"))


@pytest.mark.parametrize("name", examples.CLOSED)
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_closed_forms_at_any_scale(name, scale):
    op = examples.CLOSED[name]() * scale
    check_operator(op, examples.matrix(examples.CLOSED[name]()) * scale, rtol=1e-8)


@pytest.mark.parametrize("name", examples.LAZY)
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_lazy_at_any_scale(name, scale):
    op = examples.LAZY[name]() * scale
    check_operator(op, examples.matrix(examples.LAZY[name]()) * scale, rtol=1e-8)
