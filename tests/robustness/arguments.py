"""Random command lines of the kinds that once gave tracebacks, hangs, files left behind or pages of refusal.

`python -m tests.robustness.arguments --lists 2000` runs them and prints how often what went wrong.
"""

import os
import random
import shutil
from pathlib import Path

from tests.robustness.trial import attempt

WORDS = [
    "",
    " ",
    "x",
    "none",
    "0",
    "-1",
    "1e308",
    "-1e308",
    "nan",
    "inf",
    "1e-320",
    "9" * 19,
    "True",
    "é\u202e",
    "a" * 3000,
]
NUMBERS = ["0", "-1", "1", "2", "3", "1.5", "1e6", "1000000", "1" + "0" * 19, "1e308", "nan", "inf", "-inf", "x", ""]
SAMPLERS = [
    "none", "best-of-n", "stepwise", "svdd", "rbf", "funnel", "fk-steering", "smc", "reward-gradient", "lidar", "demon",
    "backtracking", "noise-search", "noise-optimization", "psi", "tree-sampling", "tree-search",
]  # fmt: skip
FIELDS = [
    "candidates", "particles", "temperature", "strength", "transition", "simulations", "iterations", "window", "interval",
    "trajectories", "resampling", "potential", "levels", "batch", "accept", "potentail", "tree_file", "step_size",
]  # fmt: skip
VALUES = [
    *NUMBERS,
    "cps 0.9",
    "cps 1e308",
    "ddim nan",
    "scheduler",
    "glass",
    "(0,1)",
    "[0.2,0.8]",
    "((((((1))))))",
    "None",
    ",",
]
REWARDS = [
    "shapes-drm", "shapes-verifier", "shapes-drm + 0.5 * shapes-verifier", "1e308 * shapes-drm + 1e308 * shapes-verifier",
    "nan * shapes-drm", "x * y", " + ", "nothing:there", "os:getcwd", "json:loads", "math:nan", ":", "a/b/c", "../..",
]  # fmt: skip
PATHS = [
    "prompts.txt",
    "missing.txt",
    "empty.txt",
    "folder",
    "loop",
    "/dev/full",
    "/dev/zero",
    "/dev/null",
    "fifo",
    "deep/x.txt",
]


def sampler(rng: random.Random) -> str:
    """A sampler with random options, sometimes nested or doubled."""
    name = rng.choice([*SAMPLERS, *WORDS])
    for _ in range(rng.choice([0, 0, 1, 2])):
        name += f":{rng.choice(FIELDS)}={rng.choice(VALUES)}"
    return name if rng.random() < 0.95 else name + ":" * 500


def arguments(rng: random.Random) -> list[str]:
    """One command line."""
    option = rng.choice
    common = {
        "--steps": lambda: option(NUMBERS),
        "--guidance-scale": lambda: option(NUMBERS),
        "--reward": lambda: option(REWARDS),
        "--dtype": lambda: option(["float32", "x", ""]),
        "--candidates": lambda: option(NUMBERS),
        "--transition": lambda: option(VALUES),
        "--noise": lambda: option(NUMBERS),
        "--set": lambda: f"{option(FIELDS)}={option(VALUES)}",
        "--seed": lambda: option(NUMBERS),
        "--budget": lambda: option(NUMBERS),
        "--model": lambda: option(["shapes", "nowhere", "folder", "a/b", "loop", "file.txt"]),
    }
    kinds = {
        "sample": {
            "--sampler": lambda: sampler(rng),
            "--out": lambda: option(
                ["o.png", "o.xyz", "folder", "/dev/full", "file.txt/o.png", "loop/o.png", "o.gif", ""]
            ),
            "--trace": lambda: option(["t.json", "folder", "o.png", "/dev/full"]),
            "--plot": lambda: option(["p.png", "p.svg", "p.txt", "folder"]),
            "--seconds": lambda: option(NUMBERS),
            "--value": lambda: option(
                ["tweedie", "lookahead:steps=0", "smoothed:samples=1000000", "x", "lookahead:steps=1e19", ""]
            ),
            "--lora": lambda: option(["missing.safetensors", "file.txt", "folder:nan", ":", "a/b/c:1"]),
            "--height": lambda: option(NUMBERS),
            "--device": lambda: option(["cpu", "cuda:7", "x", ""]),
        },
        "compare": {
            "--samplers": lambda: ",".join(sampler(rng) for _ in range(rng.randrange(4))),
            "--budgets": lambda: ",".join(option(NUMBERS) for _ in range(rng.randrange(3))),
            "--prompts": lambda: option(PATHS),
            "--pairs": lambda: option(NUMBERS),
            "--out": lambda: option(["report", "file.txt", "folder", "/dev/full/x"]),
        },
        "evaluate": {
            "--prompts": lambda: option(PATHS),
            "--json": lambda: option(["e.json", "folder", "/dev/full"]),
            "--sampler": lambda: sampler(rng),
            "--batch-size": lambda: option(NUMBERS),
        },
        "train reward": {
            "--config": lambda: option(["missing.yaml", "file.txt", "bad.yaml", "folder", "/dev/zero"]),
            "--out": lambda: option(["run", "file.txt"]),
            "--prompts": lambda: option(NUMBERS),
        },
        "benchmark values": {
            "--values": lambda: option(["", ",", "tweedie,x", "x"]),
            "--runs": lambda: option(NUMBERS),
        },
        "score": {"--prompt": lambda: option(WORDS)},
    }
    command = rng.choice([*kinds, "sample", "compare", "families"])
    words = command.split()
    if command == "families":
        return [*words, option(["shapes", "folder", "loop", "missing", "file.txt", "", "a/b"])]
    if command in ("sample", "compare") and rng.random() < 0.9:
        words.append(rng.choice(["a red star", *WORDS]))
    if command == "score":
        words += [option(["missing.png", "file.txt", "folder", "loop", "/dev/zero"]) for _ in range(rng.randrange(3))]
    own = kinds[command] | ({} if command in ("train reward", "score", "benchmark values") else common)
    for name in rng.sample([*own], min(len(own), rng.randrange(1, 6))):
        words += [name, own[name]()]
    return words


def furnish(folder: Path) -> None:
    """The files that command lines name."""
    (folder / "prompts.txt").write_text("a red star\n")
    (folder / "empty.txt").write_text("")
    (folder / "file.txt").write_text("x")
    (folder / "bad.yaml").write_text("steps: [1, {2")
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "fifo")


def judged(number: int, folder: Path) -> tuple[list[str], list[str], str]:
    """The command line of a number, run in a new folder: its words, its faults, and what was said."""
    folder.mkdir()
    furnish(folder)
    trial = attempt(arguments(random.Random(number)), folder)
    shutil.rmtree(folder)
    return trial.words, trial.faults(), f"{trial.seconds:.1f} s, {trial.raised or f'{trial.code} {trial.said}'}"


def run() -> None:
    """The command."""
    import argparse
    import tempfile
    import warnings

    from tests.robustness.trial import counts

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lists", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    found = []
    with tempfile.TemporaryDirectory() as place:
        for number in range(options.first, options.first + options.lists):
            words, faults, said = judged(number, Path(place, "list"))
            found.append(faults)
            if faults:
                print(f"{number} {faults}: {' '.join(words)[:300]!r}\n    {said[:700]}", flush=True)
    print(f"{len(found)} command lines: {counts(found)}")


if __name__ == "__main__":
    run()
