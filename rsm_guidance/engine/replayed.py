"""`ReplayedDenoiser`: a recorded call (`engine.replay`) as a `core.contracts.Denoiser`, whose texts are not encoded again."""

import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rsm_guidance.core.errors import UsageError
from rsm_guidance.core.schedule import NoiseSchedule, Prediction
from rsm_guidance.engine.denoiser import PipelineDenoiser
from rsm_guidance.engine.memory import MicroBatch
from rsm_guidance.engine.replay import Replay


class ReplayedDenoiser:
    """The denoiser of recorded rows, such as those of many prompts that were recorded apart and joined.

    Args:
        replay: the recording, with outputs.
        stock: the denoiser of a call of one row and otherwise of the same arguments, which makes initial latents and decodes.
        prompts: of the recorded rows.
        generators: of the rows' initial latents, where none are given.
        at_once: latents per forward pass; fewer where memory runs out.
        precision: of torch's autocast around forward passes, as a training has it; None for none.
    """

    def __init__(
        self,
        replay: Replay,
        stock: PipelineDenoiser,
        prompts: list[str],
        generators: Sequence[torch.Generator],
        at_once: int = sys.maxsize,
        precision: torch.dtype | None = None,
    ) -> None:
        if replay.levels is None or not len(prompts) == len(generators) == replay.count:
            raise UsageError(
                f"a recording with outputs of {len(prompts)} prompts is needed, and a generator each; got one of "
                f"{replay.count} rows and {len(generators)} generators"
            )
        self.replay, self.prompts = replay, prompts
        self.checkpointing = False
        self._levels, self._stock, self._generators = replay.levels, stock, generators
        self._fitting, self._precision = MicroBatch(at_once), precision

    @property
    def evaluations(self) -> float:
        """Forward passes of the denoiser so far, by latents."""
        return self.replay.evaluations

    @property
    def schedule(self) -> NoiseSchedule:
        """The levels of the recorded call."""
        return self._levels.schedule

    @property
    def evaluations_per_row(self) -> float:
        """Denoiser evaluations that one `predict` takes per latent."""
        return float(self.replay.evaluations_per_row)

    @property
    def steps(self) -> int:
        """Number of levels."""
        return self.schedule.steps

    @property
    def token_grid(self) -> tuple[int, int] | None:
        """Rows and columns of packed latents; None where latents are planes."""
        return self._stock.token_grid

    def initial(self, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Initial latents [B, ...] as the stock call prepares them for each row's generator."""
        return torch.cat([self._stock.initial([g]) for g in (generators or self._generators)])

    def predict(self, x: Tensor, level: int, rows: Tensor | None = None) -> Prediction:
        """Denoise x [R, ...] at a level 0..N-1; see `core.contracts.Denoiser`."""
        rows = torch.arange(len(self.prompts)) if rows is None else rows
        levels = torch.full((len(x),), level)
        with torch.autocast(x.device.type, self._precision, enabled=self._precision is not None):
            parts = self._fitting(lambda piece: self.replay.denoise(x[piece], levels[piece], rows[piece]), len(x))
        return Prediction.joined(parts)

    def follow(
        self,
        rows: Tensor | None = None,
        generators: Sequence[torch.Generator] | None = None,
        start: Tensor | None = None,
    ) -> Iterator[tuple[Prediction | None, Tensor]]:
        """Not offered: the pipeline's own solver is not in a recording."""
        raise UsageError("a recorded call has no solver of its own; step by 'ode', or call the pipeline")

    def decode(self, x0: Tensor, rows: Tensor | None = None) -> Tensor:
        """Clean latents [R, ...] to images [R, 3, H, W] in [0, 1]."""
        return self._stock.decode(x0, torch.zeros(len(x0), dtype=torch.int64))
