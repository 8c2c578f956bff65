"""What of a trunk is trained: nothing, a LoRA, its last blocks, or all of it."""

from rsm_guidance.core.contracts import UsageError
from rsm_guidance.reward_models.config import DRMConfig
from rsm_guidance.reward_models.trunk import Trunk


def adapt(trunk: Trunk, config: DRMConfig) -> None:
    """Leave gradients to what the configuration tunes; a LoRA is added.

    Raises:
        UsageError: if the trunk has none of the layers, or fewer blocks than are to be tuned.
    """
    if config.adaptation == "lora":
        trunk.requires_grad_(False)
        _add_lora(trunk, config)
    elif config.adaptation == "last-blocks":
        trunk.requires_grad_(False)
        for module in trunk.last_blocks(config.tuned_blocks):
            module.requires_grad_(True)


def _add_lora(trunk: Trunk, config: DRMConfig) -> None:
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds to import

    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or config.lora_rank,  # type: ignore[arg-type]  # any number scales
        target_modules=list(config.lora_targets),
    )
    try:
        inject_adapter_in_model(lora, trunk)
    except ValueError as error:
        raise UsageError(
            f"the LoRA has no layer to go to: none is named {', '.join(config.lora_targets)}; set lora_targets"
        ) from error
    for name, parameter in trunk.named_parameters():
        if "lora_" in name:  # an update of bfloat16 weights is mostly rounded away
            parameter.data = parameter.data.float()
