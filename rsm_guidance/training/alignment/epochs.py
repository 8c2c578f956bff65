"""The batches of a training: epochs of samples, made when their first update is due."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rsm_guidance.core.errors import UsageError
from rsm_guidance.core.random import derive_seed
from rsm_guidance.core.schedule import NoiseSchedule
from rsm_guidance.engine.replay import Replay
from rsm_guidance.training.alignment.config import AlignConfig
from rsm_guidance.training.alignment.evaluator import Evaluator
from rsm_guidance.training.alignment.experience import Experience
from rsm_guidance.training.alignment.learner import Learner
from rsm_guidance.training.alignment.rows import Gather, Lesson, Rows, alone, lesson
from rsm_guidance.training.loop import Metrics


@dataclass
class Epochs:
    """What `loop.fit` takes batches from.

    Between two updates older policies follow (`OldConfig`).  The old policy makes the samples; where the policy itself is to
    make them, it is a copy of it.  An epoch that is gone on with is made again, by the old policy that made it.

    Attributes:
        config: of the training.
        learner: which is trained.
        collector: makes samples (`collector.Collector`), or takes given ones.
        evaluator: is told the step, and says when to stop.
        schedule: the levels.
        guided: recordings of prompts for a reference with a guidance scale of its own; None without.
        anchor: rows of given images beside those of an update; None without.
        gather: from all processes.
        process: number of this one.
        log: figures of the last epoch.
    """

    config: AlignConfig
    learner: Learner
    collector: Callable[[int], tuple[Experience, Replay]]
    evaluator: Evaluator
    schedule: NoiseSchedule
    guided: Callable[[int], Replay] | None = None
    anchor: Callable[[int, int], tuple[Rows, Replay]] | None = None
    gather: Gather = alone
    process: int = 0
    log: Metrics = field(default_factory=dict)
    _silent: int = field(default=0, init=False)

    def start(self, step: int) -> Iterator[dict[str, Any]]:
        """The batches of updates `step`, `step` + 1, ...

        Raises:
            UsageError: after `advantage.constant_groups` epochs in a row whose samples say nothing.
        """
        made: tuple[int, Lesson, Replay, Replay | None] | None = None
        while not self.evaluator.stopped:
            epoch, part = divmod(step, self.config.updates_per_epoch)
            self._follow(step, part)
            if made is None or made[0] != epoch:
                made = epoch, *self._epoch(epoch)
            self.evaluator.step = step + 1
            batch: dict[str, Any] = {**made[1].updates[part], "replay": made[2]}
            if made[3] is not None:
                batch["guided"] = made[3]
            if self.anchor is not None:
                batch["data"], batch["data_replay"] = self.anchor(step, len(batch["row"]))
            yield batch
            step += 1

    def _follow(self, step: int, part: int) -> None:
        """Let older policies follow the policy, after `step` updates."""
        config, policy = self.config, self.learner.policy
        if config.trust.proximal == "ema" and step:
            policy.advance("average", config.old.decay(step))
        if part == 0:
            policy.advance("old", config.old.decay(step) if config.rollout.policy == "old" and step else 0.0)
        every, limit = config.trust.reset_every, config.trust.reset_at
        due = every is not None and step and step % every == 0
        if due or (limit is not None and float(self.learner.gap) > limit):
            policy.advance("reference")
            self.learner.gap.zero_()

    def _epoch(self, epoch: int) -> tuple[Lesson, Replay, Replay | None]:
        begun = time.perf_counter()
        with self.learner.policy.acting("old"):
            samples, replay = self.collector(epoch)
        seed = derive_seed(self.config.seed, "lesson", epoch)
        found = lesson(self.config, samples, self.schedule, seed, self.gather, self.process)
        self.log = {**found.log, "rollout_seconds": time.perf_counter() - begun}
        self._silent = 0 if found.informative else self._silent + 1
        if self._silent >= self.config.advantage.constant_groups:
            raise UsageError(
                f"the samples of every prompt were scored alike in {self._silent} epochs in a row, so that nothing can be "
                "learnt: choose prompts that are neither too easy nor too hard, a finer reward, or a larger rollout.group"
            )
        return found, replay, None if self.guided is None else self.guided(epoch)
