"""Gradients of a value with respect to noisy latents."""

from dataclasses import replace

import torch
from torch import Tensor

from rsm_guidance.core.ledger import BACKWARD
from rsm_guidance.core.rows import rows_where
from rsm_guidance.core.schedule import Prediction
from rsm_guidance.rewards import judged, name_of
from rsm_guidance.samplers.base import Problem


def differentiated(problem: Problem, jacobian: bool) -> float:
    """Denoiser evaluations that a gradient of the value runs backwards through, per latent."""
    value = problem.value
    if value is None or (value.reads_prediction and not jacobian):
        return 0.0
    return value.evaluations_per_row


def gradient_cost(problem: Problem, jacobian: bool) -> float:
    """Denoiser evaluations per latent of `value_and_gradient`, the prediction aside: the value's own, and the way back."""
    value = problem.value
    assert value is not None
    own = value.evaluations_per_row - (problem.denoiser.evaluations_per_row if value.reads_prediction else 0.0)
    return own + BACKWARD * differentiated(problem, jacobian)


def value_and_gradient(
    problem: Problem, x: Tensor, level: int, rows: Tensor, jacobian: bool = True
) -> tuple[Prediction, Tensor, Tensor]:
    """The denoiser's prediction, the value and its gradient at noisy latents.

    Args:
        problem: the task; its value model must be differentiable.
        x: latents [R, ...] at `level`.
        level: 0..N-1.
        rows: prompt of each latent [R].
        jacobian: differentiate through the denoiser where the value reads its estimate of the clean latents (DPS,
            arXiv 2209.14687); without, that estimate is taken to move as x / alpha (MPGD, arXiv 2311.16424), which
            needs no backward pass of the denoiser.

    Returns:
        The prediction (detached), values float64 [R], gradient [R, ...] (NaN throughout a row where any of it is not finite).

    Raises:
        ValueError: if the value is not differentiable.
    """
    value, denoiser = problem.value, problem.denoiser
    assert value is not None
    prediction: Prediction | None = None
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        if value.reads_prediction:
            if jacobian:
                prediction = denoiser.predict(leaf, level, rows)
            else:
                with torch.no_grad():
                    prediction = denoiser.predict(x, level, rows)
                leaf = prediction.x0.detach().requires_grad_()
                prediction = replace(prediction, x0=leaf)
        graph: list[Tensor] = []

        def judge() -> Tensor:
            graph.append(value(x if prediction is not None else leaf, level, rows, prediction))
            return graph[0]

        checked = judged(judge, len(x), name_of(value))
        total = graph[0].sum()
    if not total.requires_grad:
        raise ValueError(
            f"{name_of(value)} is not differentiable: its scores carry no gradient; use a sampler without gradients "
            "(fk-steering, svdd, stepwise, best-of-n)"
        )
    (gradient,) = torch.autograd.grad(total, leaf)
    problem.ledger.charge_backward(len(x), differentiated(problem, jacobian))
    if prediction is None:
        with torch.no_grad():
            prediction = denoiser.predict(x, level, rows)
    elif not jacobian:
        alpha, _ = denoiser.schedule.coefficients(level)
        gradient = gradient / alpha if alpha > 0 else torch.zeros_like(gradient)
    finite = gradient.flatten(1).isfinite().all(1)
    velocity = None if prediction.velocity is None else prediction.velocity.detach()
    detached = Prediction(x, prediction.x0.detach(), prediction.eps.detach(), velocity)
    return detached, checked, rows_where(finite, gradient, torch.full_like(gradient, torch.nan))
