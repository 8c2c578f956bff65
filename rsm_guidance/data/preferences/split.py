"""Training and test data apart by prompt, by a hash, so that no prompt moves when rows are added."""

from typing import Literal

from rsm_guidance.core.errors import UsageError
from rsm_guidance.core.random import derive_seed

Part = Literal["train", "test"]


def part_of(prompt: str, test_fraction: float = 0.05, seed: int = 0) -> Part:
    """The part that a prompt belongs to.

    Case and blanks do not count, so that spellings of one prompt stay together.

    Args:
        prompt: to be hashed with the seed.
        test_fraction: expected share of the prompts in "test", in [0, 1].
        seed: names the division.

    Raises:
        UsageError: for a fraction outside [0, 1].
    """
    if not 0 <= test_fraction <= 1:
        raise UsageError(f"the share of test prompts must lie in [0, 1]; got {test_fraction}")
    plain = " ".join(prompt.casefold().split())
    return "test" if derive_seed("split", seed, plain) < test_fraction * 2**63 else "train"
