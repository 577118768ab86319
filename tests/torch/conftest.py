"""PyTorch tests start from one random state, on one thread: small tensors gain nothing from more."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded_torch():
    torch.manual_seed(20180715)


@pytest.fixture
def quantized_engine():
    """Chooses the engine of torch's quantized kernels; afterwards it is again what it was."""
    before = torch.backends.quantized.engine

    def choose(name: str) -> None:
        torch.backends.quantized.engine = name

    yield choose
    choose(before)
