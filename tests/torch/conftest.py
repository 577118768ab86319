"""PyTorch tests start from one random state, on one thread: small tensors gain nothing from more."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded_torch():
    torch.manual_seed(20180715)
