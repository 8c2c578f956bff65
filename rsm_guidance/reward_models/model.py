"""The diffusion reward model (DRM): a diffusion backbone with a reward head that scores noisy latents.

Paper: arXiv 2605.25661.  The backbone is the denoiser of a pipeline without its last blocks.  It sees the noisy latents,
the timestep and the prompt through the denoiser's own conditioning (conditional branch only).  Scores are comparable
within one prompt and noise level.
"""

import math
import os
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
from rsm_guidance.io.reading import refusing
from rsm_guidance.reward_models.backbone import denoiser_of, load_backbone
from rsm_guidance.reward_models.blocks import Grid, block_names, token_grid
from rsm_guidance.reward_models.checkpoint import CARD, checkpoint_folder, read_config, read_tensors, write_checkpoint
from rsm_guidance.reward_models.conditioning import Conditioning
from rsm_guidance.reward_models.config import Adaptation, DRMConfig
from rsm_guidance.reward_models.heads.conv import RewardHead
from rsm_guidance.reward_models.trunk import Trunk
from rsm_guidance.reward_models.value import DRMValue

_LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
_SCORE_BATCH = 256


class LatentScorer(nn.Module):
    """Trunk and head of a DRM: the module that is trained, and that DDP wraps.

    Parameters that the last tap does not depend on get no gradient (the text stream of a last joint block, say), so DDP needs
    `find_unused_parameters=True` where the trunk is trained whole.
    """

    def __init__(self, trunk: Trunk, head: RewardHead) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head

    def features(self, arguments: dict[str, Any], grid: Grid) -> tuple[Tensor, Grid]:
        """What the head reads: float32 tokens [B, rows * columns, dim], and their rows and columns."""
        tokens, grid = self.trunk(arguments, grid)
        return tokens.float(), grid

    def forward(self, arguments: dict[str, Any], grid: Grid) -> Tensor:
        """Scores [B] from what `DiffusionRewardModel.inputs` returns."""
        scores: Tensor = self.head(*self.features(arguments, grid))
        return scores


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
        trunk = Trunk(pipe, drm_config.blocks, drm_config.taps, share=drm_config.adaptation == "frozen")
        if drm_config.adaptation == "lora":
            _add_lora(trunk, drm_config.lora_rank)
        self.scorer = LatentScorer(trunk, RewardHead(trunk.dim, drm_config.head_width).to(pipe.device))
        self._conditioning = Conditioning(pipe)
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
        head_width: int = 64,
        backbone: str | None = None,
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
            head_width: width of the reward head.
            backbone: name written into the checkpoint; default the id the pipeline was loaded from.
        """
        names = block_names(denoiser_of(pipe))
        if blocks is None:
            blocks = 1 + max(map(names.index, taps)) if taps and set(taps) <= set(names) else round(len(names) * 7 / 8)
        name = backbone or model_name(str(pipe.config.get("_name_or_path") or ""))
        return cls(pipe, DRMConfig(name, blocks, adaptation, lora_rank, head_width, tuple(taps)))

    # --- a reward of images, and a source of values ---

    @property
    def name(self) -> str:
        return "the diffusion reward model"

    @property
    def share(self) -> float:
        """Cost of scoring one latent, as a share of one denoiser evaluation."""
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
    def head(self) -> RewardHead:
        """The head that reads the trunk's features."""
        return self.scorer.head

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
        if len(latents) != len(prompts):
            raise UsageError(f"{len(prompts)} prompts need {len(prompts)} latents; got {list(latents.shape)}")
        device = next(self.head.parameters()).device
        times = torch.as_tensor(timestep, dtype=torch.float32, device=device).expand(len(latents))
        if not bool(((times >= 0) & (times <= 1000)).all()):
            raise UsageError(f"timesteps lie in [0, 1000]; got {timestep}")
        grid = grid or self.grid(latents)
        arguments = self._conditioning.arguments(latents.to(device), times, prompts, grid)
        recorded: torch.dtype = denoiser_of(self.pipe).dtype
        return (arguments if recorded == self.trunk_dtype else _cast(arguments, recorded, self.trunk_dtype)), grid

    def features(
        self, latents: Tensor, timestep: float | Tensor, prompts: list[str], grid: Grid | None = None
    ) -> tuple[Tensor, Grid]:
        """What the head reads: tokens [B, rows * columns, dim], their rows and columns.  Arguments as in `score`."""
        return self.scorer.features(*self.inputs(latents, timestep, prompts, grid))

    def score(self, latents: Tensor, timestep: float | Tensor, prompts: list[str], grid: Grid | None = None) -> Tensor:
        """Scores [B] of noisy latents; differentiable with respect to them.

        Args:
            latents: [B, C, H, W], or packed [B, S, C] for families that pack them, in the scale of the denoiser's input
                (x / sqrt(1 + sigma^2) at variance-exploding levels).
            timestep: the model timestep in [0, 1000], one or [B].
            prompts: B prompts.
            grid: rows and columns of packed latents of an image that is not square.

        Raises:
            UsageError: for latents of another family, timesteps out of range, or unequal numbers.
        """
        if len(latents) != len(prompts):
            raise UsageError(f"{len(prompts)} prompts need {len(prompts)} latents; got {list(latents.shape)}")
        times = torch.as_tensor(timestep, dtype=torch.float32).expand(len(latents))

        def scored(piece: slice) -> Tensor:
            scores: Tensor = self.scorer(*self.inputs(latents[piece], times[piece], prompts[piece], grid))
            return scores

        with cast_weights_kept([self.trunk]):
            return torch.cat(self._scoring(scored, len(latents)))

    def score_at_level(
        self, latents: Tensor, level: int, prompts: list[str], schedule: NoiseSchedule, grid: Grid | None = None
    ) -> Tensor:
        """Scores [B] of latents as a sampler has them, at a level 0..N of its schedule; otherwise as `score`."""
        if not schedule.is_flow:  # exploding levels are shown to the denoiser at the size of preserving ones
            latents = latents / math.hypot(*schedule.coefficients(level))
        return self.score(latents, float(schedule.timesteps[level]), prompts, grid)

    def score_images(self, images: Tensor, prompts: list[str], timestep: float = 0.0) -> Tensor:
        """Scores [B] of images [B, 3, H, W] in [0, 1], encoded and scored as clean latents; differentiable."""
        latents = encode_images(self.pipe, images)
        grid = None
        if latents.ndim == 3:
            patch = 2 * self.pipe.vae_scale_factor
            grid = images.shape[-2] // patch, images.shape[-1] // patch
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
        saved = {f"head.{k}": v for k, v in self.head.state_dict().items()}
        if self.drm_config.adaptation == "full":
            saved |= {f"trunk.{k}": v for k, v in self.trunk.named_parameters()}
        elif self.drm_config.adaptation == "lora":
            saved |= {f"trunk.{k}": v for k, v in self.trunk.named_parameters() if "lora_" in k}
        return saved

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
        config, tensors = read_config(folder), read_tensors(folder)
        pipe = pipe if pipe is not None else load_backbone(config.backbone)
        with refusing(f"{folder} does not describe a reward model on {config.backbone!r}"):
            drm = cls(pipe, config)
        own = drm.own_tensors()
        if own.keys() != tensors.keys() or any(own[k].shape != tensors[k].shape for k in own):
            raise UsageError(
                f"the weights in {folder} do not fit a {config.adaptation} reward model on {config.backbone!r}"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])
        return drm


def _add_lora(trunk: Trunk, rank: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds to import

    trunk.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=_LORA_TARGETS), trunk)


def _cast(value: Any, old: torch.dtype, new: torch.dtype) -> Any:
    """Arguments of a denoiser of one dtype for a copy of it in another."""
    if isinstance(value, Tensor):
        return value.to(new) if value.dtype == old else value
    if isinstance(value, dict):
        return {k: _cast(v, old, new) for k, v in value.items()}
    return type(value)(_cast(v, old, new) for v in value) if isinstance(value, list | tuple) else value
