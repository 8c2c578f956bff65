"""One tree per prompt with the latents of its nodes, and files of them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rsm_guidance.io.files import write_tensors
from rsm_guidance.samplers.tree.selection import Widening
from rsm_guidance.samplers.tree.tree import Tree

_HEADER = "rsm-guidance tree"


@dataclass
class Forest:
    """One tree per prompt, and the latents that its nodes need.

    Attributes:
        trees: [B].
        means: per prompt, the mean of the transition of every node that may get more children, on the CPU.
        clean: per prompt, finished latents by leaf, on the CPU.
        rewards: per prompt, of the leaves in the order of the simulations.
        probe: means [B, ...] of the unguided run's first transition, by which a file knows its model.
    """

    trees: list[Tree]
    means: list[dict[int, Tensor]]
    clean: list[dict[int, Tensor]]
    rewards: list[list[float]]
    probe: Tensor | None = None

    @staticmethod
    def planted(count: int, random: Sequence[bool]) -> "Forest":
        """`count` trees that have only roots."""
        rows = range(count)
        return Forest([Tree(random) for _ in rows], [{} for _ in rows], [{} for _ in rows], [[] for _ in rows])

    def save(self, path: Path, identity: dict[str, Any]) -> None:
        """Write a safetensors file, atomically; `identity` (JSON) goes into its header."""
        assert self.probe is not None
        tensors = {
            "sizes": torch.tensor([len(t) for t in self.trees]),
            "parent": torch.tensor([p for t in self.trees for p in t.parent]),
            "prior": torch.tensor([p for t in self.trees for p in t.prior], dtype=torch.float64),
            "value": torch.tensor([v for t in self.trees for v in t.value], dtype=torch.float64),
            "visits": torch.tensor([v for t in self.trees for v in t.visits]),
            "expandable": torch.tensor([e for t in self.trees for e in t.expandable]),
            "reward": torch.tensor([r for rewards in self.rewards for r in rewards], dtype=torch.float64),
            "importance": torch.tensor([w for t in self.trees for w in t.importance], dtype=torch.float64),
            "branch": torch.tensor([b for t in self.trees for b in t.branch]),
            "probe": self.probe.contiguous(),
        }
        for name, stores in (("means", self.means), ("clean", self.clean)):
            items = [(row, node, latent) for row, store in enumerate(stores) for node, latent in store.items()]
            tensors[f"{name}.at"] = torch.tensor([item[:2] for item in items]).reshape(-1, 2)
            tensors[name] = torch.stack([item[2] for item in items]) if items else torch.zeros(0)
        write_tensors(path, tensors, {_HEADER: json.dumps({"version": 1, **identity})})

    @staticmethod
    def load(
        path: Path, identity: dict[str, Any], random: Sequence[bool], widening: Widening, temperature: float
    ) -> "Forest":
        """What `save` wrote.

        Raises:
            ValueError: if the file is damaged or no tree file, or was written under another identity, naming the difference.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = (file.metadata() or {}).get(_HEADER)
                if header is None:
                    raise ValueError("it has no header of a tree file")
                found = json.loads(header)
                wanted = json.loads(json.dumps({"version": 1, **identity}))
                _compare(found, wanted, path)
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            return _read(tensors, len(identity["prompts"]), random, widening, temperature)
        except _OtherTree:
            raise
        except (SafetensorError, OSError, KeyError, ValueError, IndexError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged or no tree file: {error}. Delete it or choose another tree_file to start afresh"
            ) from error


class _OtherTree(ValueError):
    """A tree file of another run."""


def _compare(found: dict[str, Any], wanted: dict[str, Any], path: Path, inside: str = "") -> None:
    for name in sorted(found.keys() | wanted.keys()):
        old, new = found.get(name), wanted.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            _compare(old, new, path, f"{inside}{name}.")
        elif old != new:
            short = [text if len(text) < 80 else text[:77] + "..." for text in (json.dumps(old), json.dumps(new))]
            raise _OtherTree(
                f"the tree file {path} cannot be continued here: its {inside}{name} was {short[0]} and is now {short[1]}. "
                "Use what it was grown with, or another tree_file"
            )


def _read(
    tensors: dict[str, Tensor], count: int, random: Sequence[bool], widening: Widening, temperature: float
) -> Forest:
    sizes = tensors["sizes"].tolist()
    if len(sizes) != count:
        raise ValueError(f"it has {len(sizes)} trees for {count} prompts")
    columns = [torch.split(tensors[name], sizes) for name in ("parent", "prior", "expandable")]
    leaves = [_leaves(parents) for parents in columns[0]]
    rewards, importance, branch = (
        [p.tolist() for p in torch.split(tensors[n], leaves)] for n in ("reward", "importance", "branch")
    )
    trees = [
        Tree.restore(random, p.tolist(), [r / temperature for r in reward], w, b, q.tolist(), e.tolist(), widening)
        for p, q, e, reward, w, b in zip(*columns, rewards, importance, branch, strict=True)
    ]
    stores: list[list[dict[int, Tensor]]] = []
    for name in ("means", "clean"):
        store: list[dict[int, Tensor]] = [{} for _ in trees]
        for (row, node), latent in zip(tensors[f"{name}.at"].tolist(), tensors[name].unbind(), strict=True):
            if not 0 < node < len(trees[row]):
                raise ValueError(f"latents of node {node}, which row {row} does not have")
            store[row][node] = latent
        stores.append(store)
    for tree, means in zip(trees, stores[0], strict=True):
        lost = [n for n in range(1, len(tree)) if tree.expandable[n] and not tree.closed[n] and n not in means]
        if lost:
            raise ValueError(f"the latents of node {lost[0]} are missing")
    return Forest(trees, stores[0], stores[1], rewards, tensors["probe"])


def _leaves(parents: Tensor) -> int:
    """How many nodes are nobody's parent."""
    if not len(parents) or int(parents[0]) != -1 or bool((parents[1:] < 0).any()):
        raise ValueError("a tree begins with its root, and has only one")
    return len(parents) - len(set(parents[1:].tolist()))
