"""Paired bootstrap intervals for comparisons on the same prompts."""

import numpy as np
from scipy.stats import bootstrap


def mean_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Mean and 95% percentile-bootstrap interval of values [N]; of paired differences, give the differences."""
    mean = float(np.mean(values))
    if len(values) < 2 or float(np.ptp(values)) == 0:
        return mean, mean, mean
    result = bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", vectorized=True, rng=np.random.default_rng(seed)
    )
    return mean, float(result.confidence_interval.low), float(result.confidence_interval.high)
