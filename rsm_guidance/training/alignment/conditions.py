"""What the denoiser is told for prompts, recorded once for each: texts are encoded once in a training."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline

from rsm_guidance.engine import PipelineDenoiser
from rsm_guidance.engine.arguments import NotReplayable
from rsm_guidance.engine.replay import Replay
from rsm_guidance.engine.replayed import ReplayedDenoiser

_AT_ONCE = 32  # prompts that are recorded together
_CACHED_BYTES = 4 * 2**30


class Conditions:
    """Recordings of a pipeline's call, one for each prompt.

    Args:
        pipe: the pipeline.
        call: arguments of its call besides the prompt.
        prompt: any one, for the call that makes initial latents and decodes.
        precision: of torch's autocast, in which updates are computed, so that ratios are 1 on policy; None for none.

    Raises:
        NotReplayable: when first asked, if the pipeline does something that a recording would miss.
    """

    def __init__(
        self, pipe: DiffusionPipeline, call: Mapping[str, Any], prompt: str, precision: torch.dtype | None = None
    ) -> None:
        self._pipe, self._call, self._precision = pipe, dict(call), precision
        self.stock = self._denoiser([prompt])
        self._recorded: dict[str, Replay] = {}
        self._bytes = 0

    def replay(self, prompts: Sequence[str]) -> Replay:
        """The recording of prompts [B], one row each."""
        missing = [p for p in dict.fromkeys(prompts) if p not in self._recorded]
        if self._bytes > _CACHED_BYTES:
            self._recorded, self._bytes, missing = {}, 0, list(dict.fromkeys(prompts))
        self._record(missing, _AT_ONCE)
        try:
            return Replay.joined([self._recorded[p] for p in prompts])
        except NotReplayable:  # texts that were padded to the longest of other batches
            unique = list(dict.fromkeys(prompts))
            self._record(unique, len(unique))
            return Replay.joined([self._recorded[p] for p in prompts])

    def denoiser(
        self, replay: Replay, prompts: Sequence[str], generators: Sequence[torch.Generator], at_once: int
    ) -> ReplayedDenoiser:
        """The denoiser of recorded prompts; initial latents come from the generators."""
        return ReplayedDenoiser(replay, self.stock, list(prompts), generators, at_once, self._precision)

    def close(self) -> None:
        """Abandon the paused call."""
        self.stock.close()

    @torch.no_grad()
    def _record(self, prompts: Sequence[str], at_once: int) -> None:
        for start in range(0, len(prompts), at_once):
            chunk = list(prompts[start : start + at_once])
            denoiser = self._denoiser(chunk)
            try:
                found = Replay.record(denoiser)
            finally:
                denoiser.close()
            for place, prompt in enumerate(chunk):
                self._recorded[prompt] = row = found.pick([place])
                self._bytes += row.nbytes

    def _denoiser(self, prompts: list[str]) -> PipelineDenoiser:
        drawn = [torch.Generator().manual_seed(0) for _ in prompts]
        return PipelineDenoiser(self._pipe, self._call | {"prompt": prompts, "generator": drawn}, seed=0)
