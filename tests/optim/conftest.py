"""No test of an optimizer leaves anything of a recorded pass behind."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _nothing_left_open():
    yield
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch._C._len_torch_function_stack() == 0
