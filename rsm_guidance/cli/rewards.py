"""The command `rewards`: what scores images here."""

from dataclasses import dataclass

_ABOUT = {
    "shapes-drm": "diffusion reward model of the embedded model; scores noisy latents too, and is differentiable",
    "shapes-verifier": "share of a caption's demands that the image meets, in [0, 1], by reading the finished image",
    "shapes-correct": "1 where the image meets all demands of the caption, else 0",
}
_FURTHER = """\
Besides these names, --reward takes the folder or hub id of a diffusion reward model, package.module:object for a function
(images [B, 3, H, W] in [0, 1], prompts) -> scores [B], and weighted sums such as "shapes-drm + 0.5 * my_module:sharpness"."""


@dataclass(frozen=True)
class Rewards:
    """List the rewards that have names.

    rsm-guidance rewards
    """

    def run(self) -> None:
        from rsm_guidance.rewards import REWARDS

        width = max(map(len, REWARDS))
        for name, path in REWARDS.items():
            print(f"{name:{width}}  {_ABOUT.get(name, path)}")
        print("\n" + _FURTHER)
