"""Options and fixtures of all tests. No framework is imported here: the tests of core/ run where none is installed."""

import os
import pathlib
import random
import sys

# Before any test module imports TensorFlow: it reads these once.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import hypothesis
import numpy as np
import pytest

pytest.register_assert_rewrite("keras_templates")

# Examples do not depend on the run, and a slow machine fails nothing.
hypothesis.settings.register_profile("kquant", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("kquant")

SEED = 20180715


def pytest_addoption(parser):
    group = parser.getgroup("kquant")
    group.addoption(
        "--data",
        type=pathlib.Path,
        default=os.environ.get("KQUANT_DATA"),
        help="folder of real models and data sets; tests that need one are skipped without it (default: $KQUANT_DATA)",
    )
    group.addoption("--models", type=int, default=40, help="random models in the property test")
    group.addoption("--families", choices=("few", "all"), default="few", help="architectures to go through")


@pytest.fixture(scope="session")
def real_data(pytestconfig):
    """Gives the path of a real file by its name; skips the test, and says why, where it is not there."""
    folder = pytestconfig.getoption("data")

    def find(name):
        if folder is None:
            pytest.skip(f"needs {name}: no folder of real models given (--data or KQUANT_DATA)")
        path = pathlib.Path(folder) / name
        if not path.is_file():
            pytest.skip(f"needs {name}: not in the folder given by --data")
        return path

    return find


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same random state, alone or in any order."""
    random.seed(SEED)
    np.random.seed(SEED)
    for name in ("keras", "tf_keras"):
        if name in sys.modules:
            sys.modules[name].utils.set_random_seed(SEED)
