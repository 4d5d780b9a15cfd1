"""Labels and reconstructions of known difficulty, from NumPy's generators."""

from __future__ import annotations

import numpy as np

# tokens, width, offset of the mean, noise of the reconstruction, spread of the variances of the dimensions
PAIRS = {
    "good": (200, 12, 0.0, 0.3, 1.0),
    "worse_than_the_mean": (200, 12, 0.0, 2.0, 1.0),
    "far_from_zero": (300, 8, 1e4, 0.5, 1.0),
    "few_dimensions_carry_the_variance": (150, 20, 3.0, 0.4, 30.0),
    "one_dimension": (40, 1, -2.0, 0.2, 1.0),
    "two_tokens": (2, 5, 0.5, 0.3, 1.0),
}


def pair(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Labels [N, D] and reconstructions [N, D] in float64."""
    n, d, offset, noise, spread = PAIRS[name]
    rng = np.random.default_rng(list(PAIRS).index(name))
    scales = np.geomspace(1, spread, d)
    label = offset + scales * rng.normal(size=(n, d))
    return label, label + noise * scales * rng.normal(size=(n, d)) + 0.1 * noise
