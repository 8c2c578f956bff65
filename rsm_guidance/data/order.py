"""The order of training: batches of items of one shape, every item once an epoch, whatever their number."""

from collections.abc import Sequence

import torch

from rsm_guidance.core.errors import UsageError
from rsm_guidance.core.random import generator_of


def epoch_batches(
    groups: Sequence[int], size: int, seed: int, epoch: int, processes: int = 1, process: int = 0
) -> list[list[int]]:
    """The batches of one epoch for one process: items of a batch are of one group, and no item is lost or repeated.

    The order is named by (seed, epoch).  Batches over all processes are the same for any number of processes of one
    total size; each process gets an equal share of each, to within one item.

    Args:
        groups: [N], the group of each item, such as its bucket.
        size: items per batch and process; the last batch of a group may be smaller, and larger by less than `processes`
            where its rest would not give every process an item.
        seed: names the order.
        epoch: number of the epoch.
        processes: that share the batches.
        process: the one that asks.

    Raises:
        UsageError: if a group has fewer items than there are processes.
    """
    if size < 1 or not len(groups) or not 0 <= process < processes:
        raise UsageError(
            f"batches need items and a size; got {len(groups)} items, size {size}, process {process} of {processes}"
        )
    generator = generator_of("epoch", seed, epoch)
    members: dict[int, list[int]] = {}
    for item in torch.randperm(len(groups), generator=generator).tolist():
        members.setdefault(int(groups[item]), []).append(item)
    batches = []
    for group, items in sorted(members.items()):
        if len(items) < processes:
            raise UsageError(
                f"{len(items)} items of bucket {group} cannot be shared by {processes} processes; use fewer buckets"
            )
        cuts = list(range(0, len(items), size * processes))
        if len(cuts) > 1 and len(items) - cuts[-1] < processes:
            cuts.pop()
        batches += [items[start:end] for start, end in zip(cuts, [*cuts[1:], len(items)], strict=True)]
    return [batches[i][process::processes] for i in torch.randperm(len(batches), generator=generator).tolist()]
