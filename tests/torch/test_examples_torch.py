"""The digits example in PyTorch, run as the README says."""

import pytest
from digits_demo import check_demo

import kquant_torch


@pytest.mark.slow
def test_demo_prints_its_table_and_writes_its_files(tmp_path):
    check_demo("torch", tmp_path, lambda path: kquant_torch.audit(path).fully_integer)
