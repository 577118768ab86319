"""Arrays that every front end must hold on one grid, to the bit, as constant operands."""

from __future__ import annotations

import numpy as np
import pytest

# What random values seldom are: zeros, one magnitude, one sign, a range whose zero lies just below half a step.
PARTICULAR = [[0.0], [0.0, -0.0], [-0.3, 0.3, -0.3], [2.5], [3.25, 5.5], [-7.0, -0.1], [-0.49999997, 254.5, 3.3]]
ARRAYS = [np.array(v, np.float32) for v in PARTICULAR]
ARRAYS += [np.random.default_rng(seed).normal(size=(40, 50)).astype(np.float32) ** 3 for seed in range(10)]

each_array = pytest.mark.parametrize("v", ARRAYS, ids=[f"{i}" for i in range(len(ARRAYS))])
