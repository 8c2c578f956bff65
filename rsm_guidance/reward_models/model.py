"""The diffusion reward model (DRM): a diffusion backbone with a reward head that judges noisy latents.

Paper: arXiv 2605.25661.  The backbone is the denoiser of a pipeline without its last blocks; it sees the noisy latents,
the timestep and the prompt through the denoiser's own conditioning (conditional branch only).  Scores are comparable
within one prompt and noise level.
"""

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelHubMixin, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rsm_guidance.core.schedule import NoiseSchedule
from rsm_guidance.engine import encode_images
from rsm_guidance.engine.memory import MicroBatch, cast_weights_kept
from rsm_guidance.shapes.model import model_path
from rsm_guidance.reward_models.backbones import Grid, Texts, backbone_of, denoiser_of
from rsm_guidance.reward_models.heads.conv import RewardHead
from rsm_guidance.reward_models.trunk import Trunk, block_names

Adaptation = Literal["frozen", "lora", "full"]
SHAPES_BACKBONE = "shapes"
_LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
_CACHED_BYTES = 512 * 2**20  # of encoded prompts
_SCORE_BATCH = 256


_CARD = """---
{{ card_data }}
---

# A diffusion reward model

Scores noisy latents under a prompt: the lower blocks of a diffusion model with a reward head (arXiv 2605.25661).
`config.json` names the backbone; the weights here are the head and what was tuned.

```python
from rsm_guidance import DiffusionRewardModel

drm = DiffusionRewardModel.from_pretrained("path or hub id of this folder")
scores = drm.score(latents, timestep, prompts)
```
"""


@dataclass(frozen=True)
class DRMConfig:
    """What a DRM is made of.

    Attributes:
        backbone: hub id or folder of the pipeline whose denoiser is the backbone; "shapes" is the embedded model.
        blocks: number of the denoiser's blocks kept, from the input.
        taps: names of the blocks whose features the head reads; empty for the last one kept.
        adaptation: "frozen" (head only, modules shared with the pipeline), "lora" or "full" (all kept blocks tuned).
        lora_rank: rank (and alpha) of the LoRA.
        head_width: width of the reward head.
    """

    backbone: str = SHAPES_BACKBONE
    blocks: int = 4
    adaptation: Adaptation = "full"
    lora_rank: int = 16
    head_width: int = 64
    taps: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.adaptation not in ("frozen", "lora", "full"):
            raise ValueError(f"unknown adaptation {self.adaptation!r}; choose frozen, lora or full")
        if self.lora_rank < 1 or self.head_width < 1:
            raise ValueError(f"lora_rank and head_width must be positive; got {self.lora_rank} and {self.head_width}")


class DiffusionRewardModel(
    nn.Module,
    ModelHubMixin,
    library_name="rsm-guidance",
    license="apache-2.0",
    tags=["reward-model", "diffusion"],
    model_card_template=_CARD,
):
    """Scores noisy latents under a prompt; see the module's docstring.  Make one with `from_pipeline`."""

    def __init__(self, pipe: DiffusionPipeline, drm_config: DRMConfig) -> None:
        super().__init__()
        self.drm_config = drm_config
        self._pipe = (pipe,)  # in a tuple, so that it is no submodule and no parameter of ours
        self.trunk = Trunk(pipe, drm_config.blocks, drm_config.taps, share=drm_config.adaptation == "frozen")
        if drm_config.adaptation == "lora":
            self._add_lora()
        self.head = RewardHead(self.trunk.dim, drm_config.head_width).to(pipe.device)
        self._texts: dict[str, Texts] = {}
        self._text_bytes = 0
        self._scoring = MicroBatch(_SCORE_BATCH)
        self.eval()

    def _add_lora(self) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        self.trunk.requires_grad_(False)
        config = LoraConfig(
            r=self.drm_config.lora_rank, lora_alpha=self.drm_config.lora_rank, target_modules=_LORA_TARGETS
        )
        inject_adapter_in_model(config, self.trunk)

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
        names = block_names(denoiser_of(pipe), backbone_of(pipe))
        if blocks is None:
            blocks = 1 + max(map(names.index, taps)) if taps and set(taps) <= set(names) else round(len(names) * 7 / 8)
        name = backbone or str(pipe.config.get("_name_or_path") or "")
        if name == model_path():
            name = SHAPES_BACKBONE
        return cls(pipe, DRMConfig(name, blocks, adaptation, lora_rank, head_width, tuple(taps)))

    # --- scoring ---

    @property
    def pipe(self) -> DiffusionPipeline:
        """The pipeline that supplies text encoders and autoencoder."""
        return self._pipe[0]

    @property
    def name(self) -> str:
        return "the diffusion reward model"

    @property
    def depth_share(self) -> float:
        """Cost of scoring one latent, as a share of one denoiser evaluation."""
        return self.trunk.depth_share

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Texts:
        """Text features of prompts [B] by name, as the denoiser takes them; each prompt is encoded once."""
        missing = [p for p in dict.fromkeys(prompts) if p not in self._texts]
        if missing and self._text_bytes > _CACHED_BYTES:
            self._texts.clear()
            self._text_bytes = 0
            missing = list(dict.fromkeys(prompts))
        for start in range(0, len(missing), _SCORE_BATCH):
            chunk = missing[start : start + _SCORE_BATCH]
            encoded = self.trunk.backbone.encode(self.pipe, chunk)
            for i, prompt in enumerate(chunk):
                self._texts[prompt] = {name: values[i] for name, values in encoded.items()}
                self._text_bytes += sum(t.nbytes for t in self._texts[prompt].values())
        entries = [self._texts[p] for p in prompts]
        batch: Texts = {name: [e[name] for e in entries] for name in entries[0]}
        return {n: torch.stack(v) if len({t.shape for t in v}) == 1 else v for n, v in batch.items()}

    def features(self, latents: Tensor, timestep: Tensor, prompts: list[str], grid: Grid) -> tuple[Tensor, Grid]:
        """What the head reads: visual tokens [B, rows * columns, dim] and their rows and columns.

        Args:
            latents: [B, C, H, W] or packed [B, S, C], as the denoiser takes them.
            timestep: [B], in [0, 1000].
            prompts: B prompts.
            grid: rows and columns of the denoiser's image tokens.
        """
        texts = self.encode(prompts)
        arguments = self.trunk.backbone.call(self.pipe, latents.to(self.trunk_dtype), timestep, texts, grid)
        tokens, grid = self.trunk(arguments, grid)
        return tokens.float(), grid

    def forward(self, latents: Tensor, timestep: Tensor, prompts: list[str], grid: Grid) -> Tensor:
        """Scores [B]; arguments as in `features`."""
        scores: Tensor = self.head(*self.features(latents, timestep, prompts, grid))
        return scores

    def grid(self, latents: Tensor) -> Grid:
        """Rows and columns of the denoiser's image tokens for latents; packed ones are taken for a square image."""
        config = denoiser_of(self.pipe).config
        if self.trunk.backbone.packed:
            side = math.isqrt(latents.shape[1])
            if side * side != latents.shape[1]:
                raise ValueError(f"{latents.shape[1]} packed latents are no square image; pass grid=(rows, columns)")
            return side, side
        patch = config.get("patch_size") or (config.get("all_patch_size") or [1])[0]
        return latents.shape[-2] // patch, latents.shape[-1] // patch

    def _check_latents(self, latents: Tensor, count: int) -> None:
        config, packed = denoiser_of(self.pipe).config, self.trunk.backbone.packed
        form, axis = ("[B, S, C]", 2) if packed else ("[B, C, H, W]", 1)
        channels = config.in_channels
        if latents.ndim != (3 if packed else 4) or latents.shape[axis] != channels:
            raise ValueError(
                f"this reward model judges latents {form} with {channels} channels; got {list(latents.shape)}, another "
                "latent space: use a reward model trained on the generator's family"
            )
        if len(latents) != count:
            raise ValueError(f"{count} prompts need {count} latents {form}; got {list(latents.shape)}")

    def score(
        self,
        latents: Tensor,
        level_or_timestep: float | Tensor,
        prompts: list[str],
        schedule: NoiseSchedule | None = None,
        grid: Grid | None = None,
    ) -> Tensor:
        """Scores [B] of noisy latents; differentiable with respect to them.

        Args:
            latents: [B, C, H, W], or packed [B, S, C] for families that pack them; with `schedule` as a sampler has
                them, otherwise in the denoiser's scale.
            level_or_timestep: the model timestep in [0, 1000], one or [B]; with `schedule`, a level 0..N of it.
            prompts: B prompts.
            schedule: the levels that `level_or_timestep` counts in.
            grid: rows and columns of packed latents of an image that is not square.
        """
        self._check_latents(latents, len(prompts))
        if schedule is not None:
            level = int(level_or_timestep)
            level_or_timestep = float(schedule.timesteps[level])
            if not schedule.is_flow:  # exploding levels are shown to the denoiser at the size of preserving ones
                latents = latents / math.hypot(*schedule.coefficients(level))
        weight = next(self.head.parameters())
        timestep = torch.as_tensor(level_or_timestep, dtype=torch.float32, device=weight.device).expand(len(latents))
        if not bool(((timestep >= 0) & (timestep <= 1000)).all()):
            raise ValueError(f"timesteps lie in [0, 1000]; got {level_or_timestep}")
        grid = grid or self.grid(latents)
        latents = latents.to(weight.device)
        with cast_weights_kept([self.trunk]):
            return torch.cat(self._scoring(lambda p: self(latents[p], timestep[p], prompts[p], grid), len(latents)))

    @property
    def image_size(self) -> int:
        """Side of the square images, in pixels, that the backbone was made for."""
        latent = getattr(self.pipe, "default_sample_size", None) or denoiser_of(self.pipe).config.get("sample_size")
        return int(latent * self.pipe.vae_scale_factor) if isinstance(latent, int) else 1024

    @property
    def trunk_dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self.trunk.module.parameters()).dtype
        return dtype

    def score_images(self, images: Tensor, prompts: list[str], timestep: float = 0.0) -> Tensor:
        """Scores [B] of images [B, 3, H, W] in [0, 1], encoded and judged as clean latents."""
        grid = None
        if self.trunk.backbone.packed:
            grid = (
                images.shape[-2] // (2 * self.pipe.vae_scale_factor),
                images.shape[-1] // (2 * self.pipe.vae_scale_factor),
            )
        return self.score(encode_images(self.pipe, images), timestep, prompts, grid=grid)

    # --- saving and loading ---

    def _own_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds: the head, and whatever of the trunk was trained; never the named backbone."""
        saved = {f"head.{k}": v for k, v in self.head.state_dict().items()}
        if self.drm_config.adaptation == "full":
            saved |= {f"trunk.{k}": v for k, v in self.trunk.named_parameters()}
        elif self.drm_config.adaptation == "lora":
            saved |= {f"trunk.{k}": v for k, v in self.trunk.named_parameters() if "lora_" in k}
        return saved

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write config.json and model.safetensors (half precision); each file appears whole or not at all."""
        if not self.drm_config.backbone:
            raise ValueError("this reward model's backbone has no name; pass from_pipeline(..., backbone='org/model')")
        save_directory.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.detach().half().cpu().contiguous() for k, v in self._own_tensors().items()}
        weights, config = save_directory / "model.safetensors", save_directory / "config.json"
        save_file(tensors, weights.with_suffix(".partial"))
        config.with_suffix(".partial").write_text(json.dumps(asdict(self.drm_config), indent=2) + "\n")
        os.replace(weights.with_suffix(".partial"), weights)
        os.replace(config.with_suffix(".partial"), config)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load a checkpoint folder or hub repository; arguments as in `_from_pretrained`.

        Raises:
            ValueError: if files are missing or damaged, or do not fit the backbone.
        """
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir():  # before huggingface_hub reads it, which says less
            _read_config(folder)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        pipe: DiffusionPipeline | None = None,
        **unknown: Any,
    ) -> Self:
        """Load a checkpoint folder or hub repository.

        Args:
            model_id: folder or hub id.
            revision, cache_dir, force_download, local_files_only, token: as in huggingface_hub.
            pipe: an already loaded pipeline of the named backbone, to share its modules; loaded by default.

        Raises:
            ValueError: if files are missing or damaged, or do not fit the backbone.
        """
        folder = Path(model_id)
        if not folder.is_dir():
            folder = Path(
                snapshot_download(
                    model_id,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                    allow_patterns=["config.json", "model.safetensors"],
                )
            )
        try:
            config = _read_config(folder)
            tensors = load_file(folder / "model.safetensors")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{folder} is not a diffusion reward model: {error}") from error
        drm = cls(pipe if pipe is not None else load_backbone(config.backbone), config)
        own = drm._own_tensors()
        if own.keys() != tensors.keys() or any(own[k].shape != tensors[k].shape for k in own):
            raise ValueError(
                f"the weights in {folder} do not fit a {config.adaptation} reward model on {config.backbone!r}"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])
        return drm


def _read_config(folder: Path) -> DRMConfig:
    """What a checkpoint folder says of itself.

    Raises:
        ValueError: if that is missing, damaged or incomplete.
    """
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        missing = sorted({"backbone", "blocks", "adaptation"} - settings.keys())
        if missing:
            raise ValueError(f"it does not say the {missing[0]}")
        return DRMConfig(**settings)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder} is not a diffusion reward model: its config.json cannot be used: {error}"
        ) from error


def load_backbone(name: str) -> DiffusionPipeline:
    """The pipeline a checkpoint names as its backbone."""
    pipe = DiffusionPipeline.from_pretrained(model_path() if name == SHAPES_BACKBONE else name)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")
