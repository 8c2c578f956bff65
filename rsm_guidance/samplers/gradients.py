"""Gradients of a value with respect to noisy latents."""

from dataclasses import replace

import torch
from torch import Tensor

from rsm_guidance.core.rows import rows_where
from rsm_guidance.core.schedule import Prediction
from rsm_guidance.samplers.task import Task


def value_and_gradient(
    task: Task, x: Tensor, level: int, rows: Tensor, jacobian: bool = True
) -> tuple[Prediction, Tensor, Tensor, Tensor | None]:
    """The denoiser's prediction, the value and its gradient at noisy latents, and how sure the estimate is along it.

    Args:
        task: whose value must be differentiable.
        x: latents [R, ...] at `level`.
        level: 0..N-1.
        rows: prompt of each latent [R].
        jacobian: differentiate through the denoiser where the value reads its estimate of the clean latents (DPS,
            arXiv 2209.14687); without, that estimate is taken to move as x / alpha (MPGD, arXiv 2311.16424), which
            needs no backward pass of the denoiser.

    Returns:
        The prediction (detached), values float64 [R], gradient [R, ...] (NaN throughout a row where any of it is not finite), and
        Var(x0 | x_t) [R] in the direction d of the reward's gradient at the estimate, at no further cost: it is
        sigma^2 / alpha d' J d / |d|^2 with the denoiser's Jacobian J (Tweedie's second order), and J d is the gradient.  None
        where the value does not read the estimate.

    Raises:
        ValueError: if the value is not differentiable.
    """
    value, prediction = task.value, None
    reads = value.reads_prediction
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        if reads and jacobian:
            prediction = task.predict(leaf, level, rows)
        elif reads:
            with torch.no_grad():
                prediction = task.predict(x, level, rows)
            leaf = prediction.x0.detach().requires_grad_()
            prediction = replace(prediction, x0=leaf)
        graph: list[Tensor] = []

        def call() -> Tensor:
            graph.append(value(x if reads else leaf, level, rows, prediction))
            return graph[0]

        checked = task.checked(call, rows, value.name)
        total = graph[0].sum()
    if not total.requires_grad:
        raise ValueError(
            f"{value.name} is not differentiable: its scores carry no gradient; use a sampler without gradients "
            "(fk-steering, svdd, stepwise, best-of-n)"
        )
    estimate = leaf if prediction is None else prediction.x0
    gradient, direct = torch.autograd.grad(total, (leaf, estimate), allow_unused=reads and jacobian)
    through = value.evaluations_per_row if jacobian or not reads else 0.0
    task.ledger.charge_backward(len(x), through)
    if prediction is None:
        with torch.no_grad():
            prediction = task.predict(x, level, rows)
    elif not jacobian:
        alpha, _ = task.schedule.coefficients(level)
        gradient = gradient / alpha if alpha > 0 else torch.zeros_like(gradient)
    variance = _variance(task, gradient, direct, level) if reads and direct is not None else None
    finite = gradient.flatten(1).isfinite().all(1)
    velocity = None if prediction.velocity is None else prediction.velocity.detach()
    detached = Prediction(x, prediction.x0.detach(), prediction.eps.detach(), velocity)
    return detached, checked, rows_where(finite, gradient, torch.full_like(gradient, torch.nan)), variance


def _variance(task: Task, gradient: Tensor, direct: Tensor, level: int) -> Tensor:
    """Var(x0 | x_t) [R] along the reward's gradient at the estimate, `direct` [R, ...], whose gradient at x_t is `gradient`."""
    alpha, sigma = task.schedule.coefficients(level)
    if alpha == 0:
        return torch.full((len(direct),), torch.inf, dtype=torch.float64)
    g, d = (t.flatten(1).double().cpu() for t in (gradient, direct))
    return (sigma**2 / alpha * (g * d).sum(1) / d.square().sum(1).clamp(min=1e-300)).clamp(min=0.0)
