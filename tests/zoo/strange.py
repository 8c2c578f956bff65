"""A tiny pipeline written here, and what a class that no list of names can know may do otherwise.

Each subclass does one thing that the engine has to find out by trying.  Their denoiser is a convolution, which is told the timestep
and the prompt.
"""

from typing import Any

import diffusers as df
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from tests.zoo import Specimen, parts, specimen


class Denoiser(df.ModelMixin, df.ConfigMixin):
    """Answers about latents [B, 4, H, W], a timestep and an embedding [B, 1]."""

    config_name = "config.json"

    @df.configuration_utils.register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, embeds: Tensor, extra: Tensor | None = None) -> tuple[Tensor]:
        told = self.conv(sample) + timestep.flatten()[0] / 1000 + embeds[:, :, None, None]
        return (told if extra is None else told + extra,)


class Plain(DiffusionPipeline):
    """Text to image as stock pipelines do it; subclasses change a part."""

    model_cpu_offload_seq = "unet->vae"

    def __init__(self, unet: Denoiser, vae: df.AutoencoderKL, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, vae=vae, scheduler=scheduler)

    def encode_prompt(self, prompt: list[str]) -> Tensor:
        return torch.tensor([[sum(map(ord, p)) % 97 / 97] for p in prompt])

    def prepare_latents(self, count: int, generator: Any) -> Tensor:
        return randn_tensor((count, 4, 8, 8), generator=generator)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_inference_steps: int = 4,
        generator: Any = None,
        pictures: list[Tensor] | None = None,
        output_type: str = "pil",
    ) -> Any:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        embeds = self.encode_prompt(prompts)
        latents = self.prepared(self.prepare_latents(len(prompts), generator))
        self.scheduler.set_timesteps(num_inference_steps)
        extra = self.begin(latents, pictures)
        with self.progress_bar(total=num_inference_steps) as bar:
            for t in self.scheduler.timesteps:
                noise = self.answer(latents, t, embeds, extra)
                following = self.scheduler.step(timestep=t, return_dict=False, **self.told(noise, latents))[0]
                latents, extra = self.stepped(following, noise, t, latents, extra)
                bar.update()
        self.end()
        images = self.decode(latents, output_type)
        self.maybe_free_model_hooks()
        return BaseOutput(images=images)

    def prepared(self, latents: Tensor) -> Tensor:
        return latents

    def begin(self, latents: Tensor, pictures: Any) -> Any:
        return None

    def answer(self, latents: Tensor, t: Tensor, embeds: Tensor, extra: Any) -> Tensor:
        return self.unet(latents, t, embeds, extra)[0]

    def told(self, noise: Tensor, latents: Tensor) -> dict[str, Any]:
        return {"model_output": noise, "sample": latents}

    def stepped(self, following: Tensor, noise: Tensor, t: Tensor, latents: Tensor, extra: Any) -> tuple[Tensor, Any]:
        return following, extra

    def end(self) -> None:
        pass

    def decode(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        images = self.vae.decode(latents, return_dict=False)[0]
        images = (images / 2 + 0.5).clamp(0, 1)
        return images if output_type == "pt" else images.movedim(1, -1).float().numpy()


class Raw(Plain):
    """Its tensors are in [-1, 1]."""

    def decode(self, latents: Tensor, output_type: str) -> Any:
        images = self.vae.decode(latents, return_dict=False)[0]
        return images if output_type == "pt" else (images / 2 + 0.5).clamp(0, 1).movedim(1, -1).float().numpy()


class Arrays(Plain):
    """It gives no tensors."""

    def decode(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "pt":
            raise ValueError("pt is not known")
        return super().decode(latents, output_type)


class Embeddings(Plain):
    """It gives no images."""

    def decode(self, latents: Tensor, output_type: str) -> Any:
        return latents.flatten(1)


class Part(Plain):
    """Its scheduler sees all rows but the first of each latent."""

    def told(self, noise: Tensor, latents: Tensor) -> dict[str, Any]:
        return super().told(noise[:, :, 1:], latents[:, :, 1:])

    def stepped(self, following: Tensor, noise: Tensor, t: Tensor, latents: Tensor, extra: Any) -> tuple[Tensor, Any]:
        return torch.cat([latents[:, :, :1], following], 2), extra


class Twice(Plain):
    """It steps twice per level, each time with all latents."""

    def answer(self, latents: Tensor, t: Tensor, embeds: Tensor, extra: Any) -> Tensor:
        self.held = dict(vars(self.scheduler))
        return super().answer(latents, t, embeds, extra)

    def stepped(self, following: Tensor, noise: Tensor, t: Tensor, latents: Tensor, extra: Any) -> tuple[Tensor, Any]:
        vars(self.scheduler).update(self.held)
        other = self.scheduler.step(-noise, t, latents, return_dict=False)[0]
        return (following + other) / 2, extra


class Drawing(Plain):
    """It draws from torch's global generator at every level."""

    def answer(self, latents: Tensor, t: Tensor, embeds: Tensor, extra: Any) -> Tensor:
        return self.unet(latents, t, embeds, torch.randn(1, 4, 1, 1))[0]


class Remembering(Plain):
    """What it gives its denoiser depends on what that has answered before."""

    def stepped(self, following: Tensor, noise: Tensor, t: Tensor, latents: Tensor, extra: Any) -> tuple[Tensor, Any]:
        return following, noise.mean((2, 3), keepdim=True)


class Scaling(Plain):
    """It changes the latents that it has prepared."""

    def prepared(self, latents: Tensor) -> Tensor:
        return 0.5 * latents


class Pictured(Plain):
    """It adds a picture of each row, or one for all, under a name that says nothing."""

    def begin(self, latents: Tensor, pictures: Any) -> Any:
        given = torch.stack(pictures)
        if len(given) not in (1, len(latents)):
            raise ValueError(f"{len(given)} pictures for {len(latents)} prompts")
        return given.repeat(len(latents) // len(given), 1, 1, 1)


class Shared(Plain):
    """It adds all pictures to all rows, and its pictures are as many as its rows by chance."""

    def begin(self, latents: Tensor, pictures: Any) -> Any:
        return sum(pictures)[None].repeat(len(latents), 1, 1, 1)


class Padding(Plain):
    """What a prompt is encoded to depends on the longest one of its batch."""

    def encode_prompt(self, prompt: list[str]) -> Tensor:
        return super().encode_prompt(prompt) + max(map(len, prompt)) / 10


class Attending(Plain):
    """It replaces an attention processor for its call, and puts it back at the end."""

    def begin(self, latents: Tensor, pictures: Any) -> Any:
        self.held = self.unet.processor
        self.unet.processor = "replaced"

    def end(self) -> None:
        self.unet.processor = self.held


class _Negated(df.FlowMatchEulerDiscreteScheduler):
    """A scheduler whose step wants the answer with the other sign when it is told so."""

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, against: bool = False, return_dict: bool = True
    ) -> Any:
        return super().step(-model_output if against else model_output, timestep, sample, return_dict=return_dict)


class Negated(Plain):
    """It hands its scheduler the answer negated, and says so."""

    def told(self, noise: Tensor, latents: Tensor) -> dict[str, Any]:
        return super().told(-noise, latents) | {"against": True}


class _Uneven(df.FlowMatchEulerDiscreteScheduler):
    """A scheduler that steps by another amount at each place when it is told to."""

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, shares: Any = None, return_dict: bool = True
    ) -> Any:
        return super().step(
            model_output if shares is None else model_output * shares, timestep, sample, return_dict=return_dict
        )


class Uneven(Plain):
    """Its latents have a noise level of their own at each place."""

    def told(self, noise: Tensor, latents: Tensor) -> dict[str, Any]:
        return super().told(noise, latents) | {"shares": torch.linspace(0, 1, latents.shape[-1])}


def strange(cls: type[Plain]) -> Plain:
    """A pipeline of one of these classes, always with the same weights."""
    schedulers = {Negated: _Negated, Uneven: _Uneven}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = Denoiser()
        unet.processor = "own"
        made = cls(unet.eval(), parts.vae().eval(), schedulers.get(cls, df.FlowMatchEulerDiscreteScheduler)(shift=2.0))
    made.set_progress_bar_config(disable=True)
    return made


def _specimen(cls: type[Plain]) -> Specimen:
    return specimen(f"strange: {cls.__name__.lower()}", lambda: strange(cls), num_inference_steps=4)


STRANGE: dict[str, Specimen] = {
    s.name: s
    for s in map(
        _specimen,
        (
            Plain,
            Raw,
            Arrays,
            Embeddings,
            Part,
            Twice,
            Drawing,
            Remembering,
            Scaling,
            Padding,
            Attending,
            Negated,
            Uneven,
        ),
    )
}
"""Specimens by name, of those that need nothing but a prompt."""
