"""What works under which sampler, family by family: `python -m benchmarks.families --help`.

Every tiny pipeline of the zoo is asked by `engine.probe` what it can do, and then made to do it.  An entry is

- *works*: the run ends, the reported reward is that of the returned image, the ledger counts what the denoiser was called with;
  for `none` the image is the stock one, bit for bit; for `batch` each of two prompts gets the image that it gets alone, under
  step-wise sampling or, where that is refused, best-of-n;
- *refused*: one sentence says why;
- *told*: the image depends on the other prompts of its batch, and a warning says so;
- *differs*: anything else came out, silently; *fails*: it ended with another error; *promised*: the probe had said that it works.

The last three must not occur; the script ends with 1 if one does.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks import script
from rsm_guidance import RewardGuidedPipeline
from rsm_guidance.core.errors import UsageError
from rsm_guidance.engine.families import denoisers_of
from rsm_guidance.engine.probe import Findings, probe
from rsm_guidance.engine.stand_ins import batch_size
from rsm_guidance.evaluation.report.tables import table
from rsm_guidance.io.files import write_atomically, write_json
from tests.zoo import ZOO, Specimen
from tests.zoo.more import MORE
from tests.zoo.strange import STRANGE

SAMPLERS = {
    "none": "none",
    "best-of-n": "best-of-n:candidates=2",
    "stepwise": "stepwise:candidates=2",
    "fk-steering": "fk-steering:particles=2",
    "gradient": "reward-gradient",
}
BAD = ("differs", "fails", "promised")
BEGIN, END = "<!-- tried -->\n", "\n<!-- /tried -->"
SPECIMENS: dict[str, Specimen] = ZOO | MORE | STRANGE


@dataclass(frozen=True)
class Families:
    """What works under which sampler, tried on tiny pipelines of every family.

    python -m benchmarks.families

    python -m benchmarks.families --families sdxl flux_fill

    Attributes:
        out: JSON file for the result.
        page: page in which the table stands between its marks, to be written anew; none by default.
        families: names of the zoo to try; all by default.
    """

    out: Path = Path("benchmarks/results/families.json")
    page: Path | None = None
    families: tuple[str, ...] = ()


def red(images: Tensor, prompts: list[str]) -> Tensor:
    """Mean red minus mean blue; videos by all their frames."""
    return (images[..., 0, :, :] - images[..., 2, :, :]).flatten(1).mean(1)


@contextmanager
def counted(pipe: DiffusionPipeline) -> Iterator[list[int]]:
    """What the pipeline's denoisers are called with meanwhile, in latents."""
    rows: list[int] = []
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs: rows.append(batch_size(args, kwargs)), with_kwargs=True
        )
        for module in denoisers_of(pipe).values()
    ]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


def outcome(run: Callable[[], str]) -> tuple[str, str]:
    """The entry of a run, and what it said."""
    try:
        return run(), ""
    except (UsageError, ValueError) as error:
        return "refused", str(error).partition("\n")[0]
    except Exception as error:  # which is what is looked for
        return "fails", f"{type(error).__name__}: {error}".partition("\n")[0]


def images_of(output: Any) -> np.ndarray:
    """The images of a stock or guided output."""
    return np.asarray(output.images if hasattr(output, "images") else output[0])


def sampled(pipe: DiffusionPipeline, specimen: Specimen, sampler: str) -> str:
    """One run and what is checked of it."""

    def call() -> dict[str, Any]:
        named = {"generator": torch.Generator().manual_seed(0)} if sampler == "none" else {"seed": 0}
        torch.manual_seed(0)  # from which some draw besides
        return specimen.call() | named | {"output_type": "np"}

    stock = images_of(pipe(**call())) if sampler == "none" else None
    guidance = {"sampler": SAMPLERS[sampler], "reward": red}
    pipe(**call(), **guidance)  # the first one tries what is to be known
    with counted(pipe) as rows:
        out = pipe(**call(), **guidance)
    images = images_of(out)
    judged = red(torch.from_numpy(images).float().movedim(-1, -3), [""])
    same = stock is None or np.array_equal(stock, images)
    right = abs(float(judged[0]) - out.rewards[0]) < 1e-4
    return "works" if same and right and sum(rows) == out.ledger.denoiser_evaluations else "differs"


def batched(pipe: DiffusionPipeline, specimen: Specimen, sampler: str) -> str:
    """Two prompts with pictures of their own, against each alone."""
    call = specimen.call()
    if "prompt" not in call:
        return ""
    prompts = ["a cat", "a red dog on a tree"]
    each = [call | {"prompt": prompt, "seed": 3, "output_type": "np", "reward": red} for prompt in prompts]
    both = each[0] | {"prompt": prompts}
    if isinstance(call.get("negative_prompt"), str):
        both["negative_prompt"] = [call["negative_prompt"]] * 2
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        together = images_of(pipe(**both, sampler=SAMPLERS[sampler]))
    alone = [images_of(pipe(**c, sampler=SAMPLERS[sampler]))[0] for c in each]
    if all(np.allclose(a, b, atol=5e-3) for a, b in zip(together, alone, strict=True)):
        return "works"
    return "told" if any("batch" in str(w.message) for w in told) else "differs"


def promised(found: Findings, column: str) -> bool:
    """Whether the probe has said that something works."""
    if found.tried is not None:
        return False
    needs = {"none": [found.runs, found.images], "best-of-n": [found.runs, found.images]}
    stepping = [found.runs, found.levels, found.images]
    return not any(needs.get(column, stepping + ([found.gradients] if column == "gradient" else [])))


def tried(specimen: Specimen) -> dict[str, Any]:
    """The entries of one family and the sentences of those that are refused."""
    pipe = RewardGuidedPipeline.from_pipe(specimen.build())
    pipe.set_progress_bar_config(disable=True)
    found = probe(pipe)
    entries: dict[str, str] = {}
    said: dict[str, str] = {}
    for column in SAMPLERS:
        entries[column], said[column] = outcome(lambda c=column: sampled(pipe, specimen, c))  # type: ignore[misc]
        if entries[column] == "refused" and promised(found, column):
            entries[column] = "promised"
    usable = [c for c in ("stepwise", "best-of-n") if entries[c] == "works"]
    if usable:
        entries["batch"], said["batch"] = outcome(lambda: batched(pipe, specimen, usable[0]))
    return {
        "class": type(pipe).__name__.removeprefix("RewardGuided"),
        "scheduler": type(pipe.scheduler).__name__,
        "entries": entries,
        "said": {k: v for k, v in said.items() if v},
        "probe": {k: v for k, v in vars(found).items() if v},
    }


def run_families(config: Families) -> dict[str, Any]:
    """Try the families, write the JSON and the page, and return the result.

    Raises:
        UsageError: for a family that is none of the zoo.
    """
    unknown = sorted(set(config.families) - SPECIMENS.keys())
    if unknown:
        raise UsageError(f"there is no family {unknown[0]!r} in the zoo; choose among {', '.join(SPECIMENS)}")
    names = config.families or tuple(SPECIMENS)
    result: dict[str, Any] = {}
    for name in tqdm(names, desc="families"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result[name] = tried(SPECIMENS[name])
    write_json(config.out, {"families": result})
    if config.page is not None:
        head, _, rest = config.page.read_text().partition(BEGIN)
        write_atomically(
            config.page, head + BEGIN + families_table({"families": result}) + END + rest.partition(END)[2]
        )
    return {"families": result}


def families_table(result: dict[str, Any]) -> str:
    """The entries as a Markdown table."""
    columns = [*SAMPLERS, "batch"]
    rows = [
        [name, f"`{family['class']}`", family["scheduler"], *(family["entries"].get(c, "") for c in columns)]
        for name, family in result["families"].items()
    ]
    return table(["family", "class", "scheduler", *columns], rows)


def bad(result: dict[str, Any]) -> list[str]:
    """Entries that must not occur."""
    return [
        f"{name}: {column} {entry}"
        for name, family in result["families"].items()
        for column, entry in family["entries"].items()
        if entry in BAD
    ]


def _told(result: dict[str, Any]) -> str:
    """The table; and the end with 1 where an entry must not be."""
    found = bad(result)
    if found:
        sys.exit("\n".join([families_table(result), *found]))
    return families_table(result)


if __name__ == "__main__":
    script(Families, run_families, _told)
