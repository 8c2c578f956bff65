"""The training loop: resume equals uninterrupted, whatever interrupts; what is saved is whole and safe to read."""

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rsm_guidance.training import Batches, LoopConfig, adamw, cosine, fit
from rsm_guidance.training import loop as loops
from rsm_guidance.training.checkpoint import latest


class Sums(nn.Module):
    """Learns the sum of three numbers, with noise on the target; counts its steps."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.out = nn.Linear(3, 8), nn.Linear(8, 1)
        self.backbone = nn.Linear(3, 3).requires_grad_(False) if frozen else nn.Identity()
        self.register_buffer("seen", torch.zeros(()))
        self.dropout = nn.Dropout(0.1)  # of torch's global random numbers

    def forward(self, numbers: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        self.seen += 1
        x = torch.stack([numbers, numbers.square(), torch.ones_like(numbers)], 1).float() / 10
        target = x.sum(1, keepdim=True) + 0.1 * torch.randn(len(x), 1, generator=generator)
        error = (self.out(self.dropout(self.hidden(self.backbone(x)).tanh())) - target).square().mean()
        return {"loss": error, "error": error.detach()}


def train(
    folder: Path, steps: int = 12, objective: Sums | None = None, decay: float | None = 0.9, **extra: Any
) -> Sums:
    objective = objective or Sums()
    optimizer = adamw([(objective, 0.05)], 0.01)
    fit(
        objective,
        optimizer,
        cosine(optimizer, 12),
        Batches(range(10), 3, seed=1),
        LoopConfig("sums", steps, 5, ema_decay=decay),
        folder / "state",
        **extra,
    )
    return objective


def state(folder: Path) -> Path:
    found = latest(folder / "state")
    assert found is not None
    return found


def progress(folder: Path) -> dict[str, Any]:
    return json.loads((state(folder) / "progress.json").read_text())


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def stopping(after: int, stop: Any) -> type[Sums]:
    class Stopped(Sums):
        def forward(self, numbers: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
            losses = super().forward(numbers, generator)
            if int(self.seen) == after:
                stop()
            return losses

    return Stopped


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def crash() -> None:
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("decay", [0.9, None])
@pytest.mark.parametrize("after", [1, 5, 7, 12])
def test_ctrl_c_ends_the_step_and_resuming_equals_never_having_stopped(
    tmp_path: Path, after: int, decay: float | None
) -> None:
    whole = train(tmp_path / "whole", decay=decay)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", objective=stopping(after, ctrl_c)(), decay=decay)
    assert progress(tmp_path / "parts")["step"] == after
    assert same(train(tmp_path / "parts", decay=decay), whole)


def test_a_crash_goes_on_from_the_last_saved_state(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="out of memory"):
        train(tmp_path / "parts", objective=stopping(8, crash)())
    assert progress(tmp_path / "parts")["step"] == 5
    assert same(train(tmp_path / "parts"), whole)


def test_a_second_ctrl_c_does_not_wait() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), loops.held_interrupt() as interrupted:
        ctrl_c()
        assert interrupted()
        ctrl_c()
        pytest.fail("the second one was held back")
    with pytest.raises(KeyboardInterrupt), loops.held_interrupt():
        ctrl_c()  # nobody asks
    assert signal.getsignal(signal.SIGINT) is before


def test_evaluation_sees_the_averages_and_its_history_survives(tmp_path: Path) -> None:
    def run(folder: Path, objective: Sums) -> tuple[list[dict[str, float]], Sums]:
        measured: list[dict[str, float]] = []

        def evaluate(past: list[dict[str, float]]) -> dict[str, float]:
            assert not objective.training and len(past) == len(measured) + already
            weight = objective.out.weight
            measured.append(
                {"weight": weight.sum().item(), "live": live(folder) if (folder / "state").exists() else 0.0}
            )
            return {"weight": measured[-1]["weight"]}

        already = len(progress(folder)["history"]) if (folder / "state").exists() else 0
        train(folder, objective=objective, evaluate=evaluate)
        return progress(folder)["history"], objective

    def live(folder: Path) -> float:
        return load_file(state(folder) / "objective.safetensors")["out.weight"].sum().item()

    history, whole = run(tmp_path / "whole", Sums())
    assert [entry["step"] for entry in history] == [5, 10, 12] and {"weight", "loss", "error"} <= history[0].keys()
    assert whole.out.weight.sum().item() == history[-1]["weight"], "the trained objective has the averages"
    assert live(tmp_path / "whole") != history[-1]["weight"]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", stopping(7, ctrl_c)())
    assert run(tmp_path / "parts", Sums())[0] == history


def test_an_evaluation_that_fails_leaves_the_weights_that_are_trained(tmp_path: Path) -> None:
    objective, seen = Sums(), []

    def fails(past: list[dict[str, float]]) -> dict[str, float]:
        seen.append(objective.out.weight.clone())
        raise RuntimeError("no metric")

    with pytest.raises(RuntimeError, match="no metric"):
        train(tmp_path, objective=objective, evaluate=fails)
    live = Sums()
    train(tmp_path / "other", steps=5, objective=live)
    raw = load_file(state(tmp_path / "other") / "objective.safetensors")["out.weight"]
    assert torch.equal(objective.out.weight, raw) and not torch.equal(seen[0], raw) and objective.training


def test_every_trainable_tensor_moves_and_no_other(tmp_path: Path) -> None:
    objective = Sums(frozen=True)
    before = {name: p.clone() for name, p in objective.named_parameters()}
    train(tmp_path, objective=objective)
    moved = {name for name, p in objective.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in objective.named_parameters() if p.requires_grad}
    assert len(moved) == 4


def test_a_frozen_backbone_is_not_saved(tmp_path: Path) -> None:
    train(tmp_path, objective=Sums(frozen=True))
    names = {"hidden.weight", "hidden.bias", "out.weight", "out.bias"}
    assert load_file(state(tmp_path) / "objective.safetensors").keys() == names | {"seen"}
    assert load_file(state(tmp_path) / "averages.safetensors").keys() == names


def test_training_learns(tmp_path: Path) -> None:
    history: list[dict[str, float]] = []
    train(tmp_path, evaluate=lambda past: history.extend(past[-1:]) or {})
    history = progress(tmp_path)["history"]
    first = Sums()(torch.arange(10), torch.Generator())["loss"].item()
    assert history[-1]["loss"] < first / 2


def test_a_loss_that_is_not_finite_stops_before_it_spoils_the_weights(tmp_path: Path) -> None:
    class Spoiled(Sums):
        def forward(self, numbers: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
            losses = super().forward(numbers, generator)
            return losses | {"loss": losses["loss"] * float("nan")} if int(self.seen) == 7 else losses

    objective = Spoiled()
    with pytest.raises(FloatingPointError, match="loss nan.*lower the learning rate"):
        train(tmp_path, objective=objective)
    assert all(bool(p.isfinite().all()) for p in objective.parameters())
    assert progress(tmp_path)["step"] == 5


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["optimizer.bin", "scheduler.bin", "random_states_0.pkl"])
def test_no_file_of_a_state_can_run_code(tmp_path: Path, name: str) -> None:
    train(tmp_path, steps=5)
    assert sorted(p.name for p in state(tmp_path).iterdir()) == [
        "averages.safetensors", "manifest.json", "objective.safetensors", "optimizer.bin", "progress.json",
        "random_states_0.pkl", "scheduler.bin",
    ]  # fmt: skip
    saved = state(tmp_path)
    for write in (pickle.dump, torch.save):
        with open(saved / name, "wb") as file:
            write(Payload(tmp_path / "ran"), file)
        manifest = json.loads((saved / "manifest.json").read_text())
        manifest["files"][name] = (saved / name).stat().st_size  # as one would who means harm
        (saved / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match="cannot resume from .*delete that folder"):
            train(tmp_path)
        assert not (tmp_path / "ran").exists()


def test_a_damaged_or_foreign_state_is_refused_with_a_sentence(tmp_path: Path) -> None:
    class Wider(Sums):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Linear(2, 2)

    class Broader(Sums):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(8, 2)

    train(tmp_path, steps=5)
    with pytest.raises(ValueError, match="cannot resume from .*another model: 'more.bias'"):
        train(tmp_path, objective=Wider())
    with pytest.raises(ValueError, match=r"another model: 'out.weight' is \[1, 8\] and not \[2, 8\]"):
        train(tmp_path, objective=Broader())
    damaged = state(tmp_path) / "objective.safetensors"
    damaged.write_bytes(b"x" * damaged.stat().st_size)
    with pytest.raises(ValueError, match="cannot resume from"):
        train(tmp_path)


def test_a_crash_while_saving_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, steps=5)

    def full_disk(*args: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("rsm_guidance.training.checkpoint.write_tensors", full_disk)
    with pytest.raises(OSError, match="No space"):
        train(tmp_path)
    monkeypatch.undo()
    assert progress(tmp_path)["step"] == 5
    assert same(train(tmp_path), train(tmp_path / "whole"))


_TWO = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_training_loop import Sums, train
objective = Sums()
objective.dropout.p = 0.0
train(Path(sys.argv[1]), steps=int(sys.argv[2]), objective=objective)
total = sum(p.double().sum().item() for p in objective.parameters())
(Path(sys.argv[1]) / f"sum_{sys.argv[2]}_{torch.distributed.get_rank()}").write_text(repr(total))
"""


@pytest.mark.slow
def test_two_processes_agree_and_resume_in_step(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(_TWO)

    def launch(folder: str, steps: int) -> list[str]:
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        run += [str(script), str(tmp_path / folder), str(steps), str(Path(__file__).parent)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        out = subprocess.run(run, capture_output=True, text=True, timeout=300, env=environment)
        assert out.returncode == 0, out.stderr[-3000:]
        return [path.read_text() for path in sorted((tmp_path / folder).glob(f"sum_{steps}_*"))]

    whole = launch("whole", 12)
    assert len(whole) == 2 and whole[0] == whole[1]
    launch("parts", 5)
    assert launch("parts", 12) == whole
