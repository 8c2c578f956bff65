"""Log-domain importance weights; all reductions in float64 over the last dimension."""

import torch
from torch import Tensor


def normalize(log_weights: Tensor) -> Tensor:
    """Log-weights [..., K] shifted so that the weights sum to one.

    Raises:
        ValueError: if a row holds NaN or +inf, or no weight above zero.
    """
    lw = log_weights.double()
    if bool(lw.isnan().any()) or bool((lw == torch.inf).any()):
        raise ValueError(f"log-weights must be finite or -inf; got {log_weights.tolist()}")
    total = lw.logsumexp(-1, keepdim=True)
    if bool((total == -torch.inf).any()):
        raise ValueError("all particles of a group have weight zero; the reward rejects every candidate")
    return lw - total


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """1 / sum of squared normalised weights, in [1, K]; [...]."""
    return torch.exp(-(2 * normalize(log_weights)).logsumexp(-1))


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """Log of the mean weight; [...]."""
    lw = log_weights.double()
    return lw.logsumexp(-1) - torch.log(torch.tensor(float(lw.shape[-1]), dtype=torch.float64))


def choose(log_weights: Tensor, uniform: Tensor) -> Tensor:
    """Draw one index per row with probability proportional to its weight, by inversion; never a zero-weight one.

    Args:
        log_weights: [..., K].
        uniform: [...] in [0, 1).

    Returns:
        int64 [...].
    """
    cumulative = normalize(log_weights).exp().cumsum(-1)
    cumulative = cumulative / cumulative[..., -1:]
    index = torch.searchsorted(cumulative, uniform.double().unsqueeze(-1), right=True).squeeze(-1)
    return index.clamp(max=log_weights.shape[-1] - 1)
