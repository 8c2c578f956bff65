"""The compute ledger: what a sampling run has spent, and what it may spend.

The unit of account is the *denoiser evaluation* (NFE): one forward pass of the whole denoiser on one latent (a
classifier-free-guided step counts two).  A value model that runs a share f of the denoiser costs f, and a backward pass
twice what it differentiates.
"""

import sys
import time
from dataclasses import asdict, dataclass, field, fields

import torch

BACKWARD = 2.0  # cost of a backward pass, in forward passes of the same network: the usual count of operations


@dataclass(frozen=True)
class Budget:
    """Hard caps; None means no cap.  Counts are per image asked for, `seconds` is for the whole call.

    Attributes:
        evaluations: denoiser evaluations, with value models by their share and backward passes at twice what they
            differentiate.
        reward_calls: images judged by the final reward.
        decodes: latents decoded to images.
        seconds: wall-clock deadline.
    """

    evaluations: float | None = None
    reward_calls: float | None = None
    decodes: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            cap = getattr(self, f.name)
            if cap is not None and not cap > 0:
                raise ValueError(f"a budget must be positive; got {f.name}={cap}. Leave it out for no cap.")


@dataclass
class Ledger:
    """Running totals of one call over all its images; `images` scales per-image caps."""

    budget: Budget = field(default_factory=Budget)
    images: int = 1
    denoiser_evaluations: float = 0.0
    value_evaluations: int = 0
    value_cost: float = 0.0
    reward_calls: int = 0
    decodes: int = 0
    backward_passes: int = 0
    backward_cost: float = 0.0
    peak_memory_bytes: int = 0
    stopped: str | None = None
    _started: float = field(default_factory=time.perf_counter, repr=False)
    _finished: float | None = field(default=None, repr=False)

    @property
    def evaluations(self) -> float:
        """Denoiser evaluations, with value models by their share and backward passes at twice what they differentiate."""
        return self.denoiser_evaluations + self.value_cost + self.backward_cost

    @property
    def seconds(self) -> float:
        return (self._finished or time.perf_counter()) - self._started

    def charge_value(self, rows: int, share: float) -> None:
        """Book `rows` value-model calls that each run a `share` of the denoiser."""
        self.value_evaluations += rows
        self.value_cost += rows * share

    def charge_backward(self, rows: int, evaluations: float) -> None:
        """Book the backward passes of `rows` latents, each through so many denoiser evaluations."""
        self.backward_passes += rows
        self.backward_cost += rows * BACKWARD * evaluations

    def affords(self, evaluations: float = 0.0, reward_calls: int = 0, decodes: int = 0) -> bool:
        """Whether this much more, summed over all images, stays within every cap on counts (not the deadline)."""
        b = self.budget
        demands = (
            (b.evaluations, self.evaluations + evaluations),
            (b.reward_calls, self.reward_calls + reward_calls),
            (b.decodes, self.decodes + decodes),
        )
        return all(cap is None or total <= cap * self.images + 1e-6 for cap, total in demands)

    @property
    def late(self) -> bool:
        """Whether the deadline has passed."""
        return self.budget.seconds is not None and self.seconds >= self.budget.seconds

    def stop(self, why: str) -> None:
        """Note why the run ended early: "budget", "deadline", "interrupted" or "over-optimised".

        The first reason stays, but for a budget that only thinned the search: what cut the run off replaces it.
        """
        if self.stopped in (None, "budget"):
            self.stopped = why

    def finish(self) -> None:
        """Stop the clock and read the peak memory."""
        self._finished = time.perf_counter()
        self.peak_memory_bytes = peak_memory()

    def to_dict(self) -> dict[str, float | int | str | None]:
        """Totals over the whole call, JSON-serialisable."""
        names = [f.name for f in fields(self) if not f.name.startswith("_") and f.name != "budget"]
        totals = {k: v for k, v in asdict(self).items() if k in names}
        return totals | {"evaluations": self.evaluations, "seconds": self.seconds}


def peak_memory() -> int:
    """Largest number of bytes this process has held so far: of the accelerator if one is used, else of main memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
