"""The diffusion reward model (DRM): a diffusion backbone with a reward head that scores noisy latents.

Paper: arXiv 2605.25661.  The backbone is the denoiser of a pipeline without its last blocks.  It sees the noisy latents,
the timestep and the prompt through the denoiser's own conditioning (conditional branch only).  Scores are comparable
within one prompt and noise level, and beyond if it was trained for that.
"""

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from rsm_guidance.core.contracts import Denoiser, Reward, UsageError
from rsm_guidance.core.random import RandomStreams
from rsm_guidance.core.schedule import NoiseSchedule
from rsm_guidance.engine import encode_images
from rsm_guidance.engine.memory import MicroBatch, cast_weights_kept
from rsm_guidance.io.names import model_name
from rsm_guidance.reward_models.adaptation import adapt
from rsm_guidance.reward_models.backbone import denoiser_of, load_backbone
from rsm_guidance.reward_models.blocks import Grid, block_names, token_grid
from rsm_guidance.reward_models.calls import cast, check_call, graph_for
from rsm_guidance.reward_models.checkpoint import (
    CARD,
    checkpoint_folder,
    copy_tensors,
    read_checkpoint,
    write_checkpoint,
)
from rsm_guidance.reward_models.conditioning import Conditioning
from rsm_guidance.reward_models.config import Adaptation, DRMConfig, HeadName, OutputName
from rsm_guidance.reward_models.ensemble import NoiseEnsemble, shown
from rsm_guidance.reward_models.heads import HEADS, Head
from rsm_guidance.reward_models.levels import level_table
from rsm_guidance.reward_models.outputs import OUTPUTS, RewardOutput, joined, mixture, normalised
from rsm_guidance.reward_models.scorer import LatentScorer
from rsm_guidance.reward_models.trunk import Trunk, widths_of
from rsm_guidance.reward_models.value import DRMValue

_SCORE_BATCH = 256


class DiffusionRewardModel(
    nn.Module,
    ModelHubMixin,
    library_name="rsm-guidance",
    license="apache-2.0",
    tags=["reward-model", "diffusion"],
    model_card_template=CARD,
):
    """A reward of images (`core.contracts.Reward`) that also scores noisy latents.  Make one with `from_pipeline`.

    Called with images it scores images; `score` and `score_at_level` score latents; `value` guides a denoiser.

    Attributes:
        drm_config: what it is made of.
        scorer: trunk and head, the module to train: `scorer(*drm.inputs(latents, timestep, prompts))`.
    """

    differentiable: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ()

    def __init__(self, pipe: DiffusionPipeline, drm_config: DRMConfig) -> None:
        super().__init__()
        self.drm_config = drm_config
        self._pipe = (pipe,)  # in a tuple, so that it is no submodule and no parameter of ours
        trunk = Trunk(pipe, drm_config)
        adapt(trunk, drm_config)
        self.scorer = LatentScorer(trunk, HEADS[drm_config.head](trunk.widths, drm_config).to(pipe.device))
        self._tuned = [name for name, tensor in trunk.named_parameters() if tensor.requires_grad]
        self._conditioning = Conditioning(pipe, drm_config.max_sequence_length)
        self._scoring = MicroBatch(_SCORE_BATCH)
        self.eval()

    @classmethod
    def from_pipeline(
        cls,
        pipe: DiffusionPipeline,
        *,
        blocks: int | None = None,
        taps: tuple[str, ...] = (),
        adaptation: Adaptation = "full",
        lora_rank: int = 16,
        head_width: int | None = None,
        backbone: str | None = None,
        head: HeadName = "conv",
        output: OutputName = "scalar",
        **settings: Any,
    ) -> Self:
        """An untrained DRM over a pipeline's denoiser.

        Args:
            pipe: the pipeline; a frozen DRM shares its denoiser's modules, the others copy the kept blocks.
            blocks: blocks kept from the input; default up to the last tap, without taps seven eighths of the depth, the
                paper's share (21 of 24).
            taps: blocks whose features the head reads, in the order they run (UNets: "mid_block", "up_blocks.1");
                default the last one kept.
            adaptation: what is trained and saved besides the head.
            lora_rank: rank of the LoRA, where there is one.
            head_width: width of the reward head; default the head's own.
            backbone: name written into the checkpoint; default the id the pipeline was loaded from.
            head, output: names in `heads.HEADS` and `outputs.OUTPUTS`.
            settings: further fields of `DRMConfig`.
        """
        fields = DRMConfig.__dataclass_fields__
        if unknown := sorted(settings.keys() - fields.keys()):
            raise UsageError(f"a reward model has no setting {unknown[0]!r}; it has {', '.join(fields)}")
        read = (*taps, *settings.get("text_taps", ()))
        name = backbone or model_name(str(pipe.config.get("_name_or_path") or ""))
        config = DRMConfig(
            name, _default_blocks(denoiser_of(pipe), read, head) if blocks is None else blocks, adaptation, lora_rank,
            64 if head_width is None else head_width, tuple(taps), head, output,
            **{"denoiser": type(denoiser_of(pipe)).__name__, **settings},
        )  # fmt: skip
        if head_width is None:
            config = replace(config, head_width=HEADS[head].default_width(widths_of(denoiser_of(pipe), config)))
        return cls(pipe, config)

    # --- a reward of images, and a source of values ---

    @property
    def name(self) -> str:
        return "the diffusion reward model"

    @property
    def share(self) -> float:
        """Cost of scoring an image, in denoiser evaluations: that of a latent, for every noise that it is scored under."""
        return self.latent_share * max(1, len(self.drm_config.image_levels) * self.drm_config.image_draws)

    @property
    def latent_share(self) -> float:
        """Cost of scoring one noisy latent, as a share of one denoiser evaluation."""
        return self.trunk.depth_share

    def forward(self, images: Tensor, prompts: list[str], **columns: list[Any]) -> Tensor:
        """Scores [B] of images [B, 3, H, W] in [0, 1]; it needs no columns."""
        return self.score_images(images, prompts)

    def value(self, denoiser: Denoiser, reward: Reward | None, streams: RandomStreams) -> DRMValue:
        """The value of a denoiser's latents: their own scores, whatever `reward` and `streams` are."""
        return DRMValue(self, denoiser, getattr(denoiser, "token_grid", None))

    # --- parts ---

    @property
    def pipe(self) -> DiffusionPipeline:
        """The pipeline that supplies text encoders and autoencoder."""
        return self._pipe[0]

    @property
    def trunk(self) -> Trunk:
        """The lower part of the denoiser."""
        return self.scorer.trunk

    @property
    def head(self) -> Head:
        """The head that reads the trunk's features."""
        return self.scorer.head

    @property
    def conditioning(self) -> Conditioning:
        """What the denoiser is given for prompts."""
        return self._conditioning

    @property
    def image_size(self) -> int:
        """Side of the square images, in pixels, that the backbone was made for."""
        latent = getattr(self.pipe, "default_sample_size", None) or denoiser_of(self.pipe).config.get("sample_size")
        return int(latent * self.pipe.vae_scale_factor) if isinstance(latent, int) else 1024

    @property
    def trunk_dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self.trunk.module.parameters()).dtype
        return dtype

    # --- scores of latents ---

    def inputs(
        self, latents: Tensor, timestep: float | Tensor, prompts: list[str], grid: Grid | None = None
    ) -> tuple[dict[str, Any], Grid]:
        """What `scorer` takes: the denoiser's arguments, and rows and columns of its image tokens.  Arguments as in `score`."""
        check_call(latents, prompts, "latents")
        device = next(self.head.parameters()).device
        times = torch.as_tensor(timestep, dtype=torch.float32, device=device).expand(len(latents))
        if not bool(((times >= 0) & (times <= 1000)).all()):
            raise UsageError(f"timesteps lie in [0, 1000]; got {timestep}")
        grid = grid or self.grid(latents)
        arguments = self._conditioning.arguments(latents.to(device), times, prompts, grid)
        recorded: torch.dtype = denoiser_of(self.pipe).dtype
        return (arguments if recorded == self.trunk_dtype else cast(arguments, recorded, self.trunk_dtype)), grid

    def features(
        self, latents: Tensor, timestep: float | Tensor, prompts: list[str], grid: Grid | None = None
    ) -> tuple[Tensor, Grid]:
        """Image tokens [B, rows * columns, dim] that the head reads, their rows and columns.  Arguments as in `score`."""
        read = self.scorer.read(*self.inputs(latents, timestep, prompts, grid))
        return read.tokens, read.grid

    def read(self, raw: Tensor) -> RewardOutput:
        """What the scorer's numbers mean, on the scale that is trained: scores before `score_mean` and `score_std`."""
        return OUTPUTS[self.drm_config.output](raw, self.drm_config.ratings)

    def judge(
        self, latents: Tensor, timestep: float | Tensor, prompts: list[str], grid: Grid | None = None
    ) -> RewardOutput:
        """Scores with their variance or distribution, where the model gives one; arguments as in `score`."""
        check_call(latents, prompts, "latents")
        times = torch.as_tensor(timestep, dtype=torch.float32).expand(len(latents))

        def scored(piece: slice) -> Tensor:
            raw: Tensor = self.scorer(*self.inputs(latents[piece], times[piece], prompts[piece], grid))
            return raw

        with graph_for(latents), cast_weights_kept([self.trunk]):
            raw = torch.cat(self._scoring(scored, len(latents)))
        return normalised(self.read(raw), self.drm_config.score_mean, self.drm_config.score_std)

    def score(self, latents: Tensor, timestep: float | Tensor, prompts: list[str], grid: Grid | None = None) -> Tensor:
        """Scores [B] of noisy latents; differentiable with respect to them.

        Where the latents need no gradient no graph is kept: to train, call `scorer`.

        Args:
            latents: [B, C, H, W], or packed [B, S, C] for families that pack them, in the scale of the denoiser's input
                (x / sqrt(1 + sigma^2) at variance-exploding levels).
            timestep: the model timestep in [0, 1000], one or [B].
            prompts: B prompts.
            grid: rows and columns of packed latents of an image that is not square.

        Raises:
            UsageError: for latents of another family, timesteps out of range, or unequal numbers.
            TypeError: for arguments of other kinds, such as latents and prompts the wrong way round.
        """
        return self.judge(latents, timestep, prompts, grid).mean

    def score_at_level(
        self, latents: Tensor, level: int, prompts: list[str], schedule: NoiseSchedule, grid: Grid | None = None
    ) -> Tensor:
        """Scores [B] of latents as a sampler has them, at a level 0..N of its schedule; otherwise as `score`.

        Clean ones are scored under one noise of the first of the `image_levels`, where there are any.
        """
        alpha, sigma = schedule.coefficients(level)
        if not schedule.is_flow:  # exploding levels are shown to the denoiser at the size of preserving ones
            latents = latents / math.hypot(alpha, sigma)
        if sigma == 0 and self.drm_config.image_levels:
            return self.judge_clean(latents, prompts, grid, NoiseEnsemble(self.drm_config.image_levels[:1])).mean
        return self.score(latents, float(schedule.timesteps[level]), prompts, grid)

    def judge_clean(
        self, latents: Tensor, prompts: list[str], grid: Grid | None = None, noise: NoiseEnsemble | None = None
    ) -> RewardOutput:
        """Clean latents, noised to some levels and judged there, together.

        The head "query" reads the tokens of all levels at once, as DiNa-LRM does; of other heads it is the mixture of what
        they say at each.  All latents get the same noises, so that a score depends on no other latent of the batch.

        Args:
            latents: [B, ...], clean; prompts, grid: as in `score`.
            noise: levels, draws and seed; default `image_levels` and `image_draws`.
        """
        check_call(latents, prompts, "latents")
        noise = NoiseEnsemble(self.drm_config.image_levels, self.drm_config.image_draws) if noise is None else noise
        if not noise.levels:
            return self.judge(latents, 0.0, prompts, grid)
        table = level_table(self.pipe.scheduler)
        noises = noise.noises(latents.shape[1:], table)

        def judged(piece: slice) -> RewardOutput:
            x, words = latents[piece], prompts[piece]
            inputs = [self.inputs(y, timestep, words, grid) for y, timestep in shown(x, noises, table)]
            return mixture([self.read(raw) for raw in self.scorer.together(inputs)])

        with graph_for(latents), cast_weights_kept([self.trunk]):
            parts = self._scoring(judged, len(latents))
        return normalised(joined(parts), self.drm_config.score_mean, self.drm_config.score_std)

    def score_images(self, images: Tensor, prompts: list[str], timestep: float | None = None) -> Tensor:
        """Scores [B] of images [B, 3, H, W] in [0, 1]; differentiable.

        They are encoded and scored as clean latents, at `image_levels` where the model has them; with a `timestep` as
        they are, under that timestep.
        """
        check_call(images, prompts, "images")
        latents = encode_images(self.pipe, images)
        grid = None
        if latents.ndim == 3:
            patch = 2 * self.pipe.vae_scale_factor
            grid = images.shape[-2] // patch, images.shape[-1] // patch
        if timestep is None:
            return self.judge_clean(latents, prompts, grid).mean
        return self.score(latents, timestep, prompts, grid)

    def grid(self, latents: Tensor) -> Grid:
        """Rows and columns of the denoiser's image tokens for latents; packed ones are taken for a square image."""
        grid = token_grid(denoiser_of(self.pipe), latents)
        if grid is None:
            side = math.isqrt(latents.shape[1])
            if side * side != latents.shape[1]:
                raise UsageError(f"{latents.shape[1]} packed latents are no square image; pass grid=(rows, columns)")
            return side, side
        return grid

    # --- saving and loading ---

    def own_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds: the head, and whatever of the trunk was trained; never the named backbone."""
        # the head first: under FSDP its state_dict frees parameters that are whole
        saved = {f"head.{k}": v for k, v in self.head.state_dict().items()}
        trunk = dict(self.trunk.named_parameters())
        return saved | {f"trunk.{k}": trunk[k] for k in self._tuned}

    def _save_pretrained(self, save_directory: Path) -> None:
        write_checkpoint(save_directory, self.drm_config, self.own_tensors())

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        pipe: DiffusionPipeline | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **unknown: Any,
    ) -> Self:
        """Load a checkpoint folder or hub repository.

        Args:
            pretrained_model_name_or_path: folder or hub id.
            pipe: a loaded pipeline of the named backbone, to share its modules; loaded by default.
            revision, cache_dir, force_download, local_files_only, token: as in huggingface_hub.

        Raises:
            UsageError: if files are missing or damaged or do not fit the backbone, and for unknown arguments.
        """
        if unknown:
            raise UsageError(
                f"from_pretrained takes no argument {next(iter(unknown))!r}; besides pipe it takes revision, cache_dir, "
                "force_download, local_files_only and token: what the model is made of is in its config.json"
            )
        folder = checkpoint_folder(
            pretrained_model_name_or_path, revision=revision, cache_dir=cache_dir, force_download=force_download,
            local_files_only=local_files_only, token=token,
        )  # fmt: skip
        config, tensors = read_checkpoint(folder)
        pipe = load_backbone(config.backbone) if pipe is None else pipe
        found = type(denoiser_of(pipe)).__name__
        if config.denoiser and config.denoiser != found:
            raise UsageError(
                f"the reward model in {folder} was made for the {config.denoiser} of {config.backbone!r}, and the pipeline has "
                f"a {found}: load it with a pipeline of its own backbone"
            )
        try:
            drm = cls(pipe, config)
        except RuntimeError as error:  # of torch: sizes that no memory holds
            raise UsageError(f"the reward model that {folder} describes cannot be built: {error}") from error
        copy_tensors(
            tensors, drm.own_tensors(), f"{folder} do not fit a {config.adaptation} reward model on {config.backbone!r}"
        )
        return drm


def _default_blocks(denoiser: nn.Module, read: tuple[str, ...], head: str) -> int:
    names = block_names(denoiser)
    if read and set(read) <= set(names):
        return 1 + max(map(names.index, read))
    whole = HEADS[head].reads_output and "up_blocks.0" in names if head in HEADS else False
    return len(names) if whole else round(len(names) * 7 / 8)
