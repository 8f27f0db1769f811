"""The training loop: AdamW on whatever a `Task` says its loss is, with the best held-out state kept.

A batch's gradient is that of its mean loss: the sum over its rows in all processes and parts, divided by the number of
terms (tokens) in all of them. So parts and processes change the result by float rounding only. Mixed precision is
autocast; fp16 has dynamic loss scaling (arXiv 1710.03740, sec. 3.2). What a step does depends on nothing but the state
before it: a run resumes with the same result. Held-out losses are those of the end of the task's schedule.

A loss or gradient that is not finite stops the run before it touches a parameter, and so does a loss that has exploded.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtool.errors import TrainingError
from qtool.report.model import peak_memory_bytes
from qtool.training.batches import Order, parts
from qtool.training.checkpoints import Checkpoints
from qtool.training.curve import Curve
from qtool.training.options import Training
from qtool.training.world import World

Progress = Callable[[str, int, int, str], None]

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
FIRST_SCALE = 2.0**16  # of the loss in fp16; 1 is the smallest
GROWTH_STEPS = 1000  # so many finite gradients double the scale
REPORT_S = 10.0  # between two reports of progress, besides those of evaluations


class Task(nn.Module, ABC):
    """What is trained: the float32 parameters that require a gradient, of one dimension or more."""

    rows: int  # how many there are; they are named by index

    @abstractmethod
    def forward(self, indexes: list[int]) -> tuple[Tensor, Tensor]:
        """The sum of the losses of these rows, and of how many terms it is."""

    def groups(self) -> list[dict[str, Any]]:
        """All that is trained, in AdamW's groups; `lr_scale` multiplies the learning rate of one."""
        return [{"params": [parameter for parameter in self.parameters() if parameter.requires_grad]}]

    def units(self) -> list[nn.Module]:
        """What several processes gather at a time: the decoder blocks."""
        return []

    def schedule(self, share: float) -> None:
        """Called before a step, with the share of the run that is behind it; with 1 before evaluations."""


def train(
    task: Task,
    options: Training,
    world: World,
    folder: Path | None,
    progress: Progress,
    name: str,
    held_out: list[int],
    rows: list[int],
) -> Curve:
    """Train on `rows`; the task ends in the state of the least loss on `held_out`, or in the last one without any.

    Checkpoints of the run stand in `folder`, and it goes on from them; without one, the best state is in memory.
    Progress reports go under `name`. Raises TrainingError.
    """
    return _Run(task, options, world, folder, progress, name, held_out, rows).run()


class _Run:
    def __init__(
        self,
        task: Task,
        options: Training,
        world: World,
        folder: Path | None,
        progress: Progress,
        name: str,
        held_out: list[int],
        rows: list[int],
    ) -> None:
        self.task, self.options, self.world, self.progress, self.name = task, options, world, progress, name
        self.held_out, self.order = held_out, Order(rows, options.total_rows(len(rows)), options.seed)
        self.total = options.total_steps(len(rows))
        self.evaluate_every = options.evaluation_steps(self.total)
        self.checkpoint_every = options.checkpoint_every or self.evaluate_every
        world.shard(task)
        self.trained = {key: p for key, p in task.named_parameters() if p.requires_grad}
        decay = options.weight_decay
        self.optimizer = torch.optim.AdamW(task.groups(), lr=options.lr, weight_decay=decay, fused=True)
        grouped = {p for group in self.optimizer.param_groups for p in group["params"]}
        assert grouped == set(self.trained.values()), "the groups are not what is trained"
        for p in grouped:  # what the optimizer itself begins with
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.optimizer.state[p] = {"step": torch.zeros((), device=world.device), **moments}
        self.step = 0  # so many are done
        self.curve = Curve(self.total, options.lr)
        self.scale = FIRST_SCALE if options.precision == "fp16" else 1.0
        self.finite_steps = 0  # since the scale changed
        self.best: list[Tensor] = []  # without a folder: this process's share of the best state
        self.checkpoints = Checkpoints(folder, self._identity(), world) if folder else None
        self.wide = torch.float32 if world.device.type == "mps" else torch.float64  # for sums

    def run(self) -> Curve:
        if self.checkpoints and self.checkpoints.state:
            self._resume(self.checkpoints)
        resumed = self.step
        self.started_s = time.perf_counter() - self.curve.wall_s
        self.reported_s = self.curve.wall_s
        while not self.curve.stopped:
            at_end = self.step == self.total
            due = at_end or self.step % self.evaluate_every == 0
            if self.held_out and due and self.step > self.curve.evaluated:
                self._evaluate()
            if at_end:
                self._finish("end")
            elif self.options.patience and self.curve.worse_evaluations >= self.options.patience:
                self._finish("patience")
            else:
                if self.step > resumed and self.step % self.checkpoint_every == 0:
                    self._checkpoint()
                self._train()
        return self.curve

    def _train(self) -> None:
        """One step."""
        self.task.schedule(self.step / self.total)
        sums = torch.zeros(3, dtype=self.wide, device=self.world.device)  # loss, terms, square of the gradient's norm
        unit: Tensor | None = None  # what losses are divided by on the way: all terms, if parts have equally many
        shares = self._parts(self.order.batch(self.step, self.options.batch))
        for indexes, weight in shares:
            loss, terms = self._forward(indexes)
            sums[0] += weight * loss.detach()
            sums[1] += weight * terms
            if unit is None:
                unit = self.world.sum(sums[1] * len(shares)).clamp(min=1)
            (loss * (weight * self.scale / unit)).backward()
        assert unit is not None
        gradients = [self.world.local(_gradient(p)) for p in self.trained.values()]
        sums[2] = nn.utils.get_total_norm(gradients).to(self.wide).square()
        sums = torch.cat([self.world.sum(sums), unit[None]])
        loss_sum, terms_sum, square, divisor = sums.tolist()  # the one time that the host waits for the device
        factor = divisor / max(terms_sum, 1) / self.scale  # from these gradients to that of the mean
        norm = math.sqrt(square) * factor
        self.step += 1
        self.curve.train.append((self.step, loss_sum / max(terms_sum, 1)))
        self.curve.tokens += int(terms_sum)
        self._check_loss()
        if self._is_usable(norm):
            if self.options.clip:
                factor *= min(1.0, self.options.clip / (norm + 1e-6))  # as torch's clip_grad_norm_
            if factor != 1:
                torch._foreach_mul_(gradients, factor)
            rate = self.options.lr * self.options.rate(self.step - 1, self.total)
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
            self.optimizer.step()
        self.optimizer.zero_grad()
        if time.perf_counter() - self.started_s > self.reported_s + REPORT_S:
            self._report()

    def _is_usable(self, norm: float) -> bool:
        """Whether a gradient is finite. Else the step is skipped, and the loss scaled by less, in fp16."""
        if math.isfinite(norm):
            self.finite_steps += 1
            if self.options.precision == "fp16" and self.finite_steps == GROWTH_STEPS:
                self.scale, self.finite_steps = self.scale * 2, 0
            return True
        if self.scale <= 1:
            raise self._stopped(f"the norm of the gradient is {norm}")
        self.scale, self.finite_steps = self.scale / 2, 0
        self.curve.skipped += 1
        return False

    @torch.no_grad()
    def _evaluate(self) -> None:
        self.task.schedule(1.0)
        sums = torch.zeros(2, dtype=self.wide, device=self.world.device)  # loss, terms
        for first in range(0, len(self.held_out), self.options.batch):
            for indexes, weight in self._parts(self.held_out[first : first + self.options.batch]):
                loss, terms = self._forward(indexes)
                sums[0] += weight * loss
                sums[1] += weight * terms
        self.world.settle(self.task)
        loss_sum, terms_sum = self.world.sum(sums).tolist()
        mean = loss_sum / max(terms_sum, 1)
        if not math.isfinite(mean):
            raise self._stopped(f"the held-out loss is {mean}")
        best = self.curve.best_held_out
        self.curve.held_out.append((self.step, mean))
        if best is None or mean < best:
            self._keep()
        self._report()

    def _forward(self, indexes: list[int]) -> tuple[Tensor, Tensor]:
        dtype = AUTOCAST.get(self.options.precision)
        with torch.autocast(self.world.device.type, dtype, enabled=dtype is not None):
            loss, terms = self.task(indexes)
        return loss, terms

    def _parts(self, batch: list[int]) -> list[tuple[list[int], float]]:
        return parts(batch, self.options.accumulate, self.world.rank, self.world.size)

    # States

    def _keep(self) -> None:
        """This is the best state so far."""
        self.curve.best_step = self.step
        if self.checkpoints:
            self.checkpoints.write_best(self.step, self.trained)
        else:
            self.best = self.best or [torch.empty_like(share) for share in self._shares()]
            torch._foreach_copy_(self.best, self._shares())

    def _load_best(self) -> None:
        if self.checkpoints:
            self.checkpoints.read_best(self.curve.best_step, self.trained)
        else:
            torch._foreach_copy_(self._shares(), self.best)

    def _shares(self) -> list[Tensor]:
        """This process's share of what is trained."""
        return [self.world.local(p.detach()) for p in self.trained.values()]

    def _checkpoint(self) -> None:
        if self.checkpoints:
            self._measure()
            self.checkpoints.write(self._state(), self._tensors())

    def _finish(self, stopped: str) -> None:
        if not self.held_out:
            self._keep()
        elif self.curve.best_step < self.step:
            self._load_best()
        self.curve.stopped = stopped
        self._measure()
        if self.checkpoints:
            self.checkpoints.write(self._state(), {})

    def _resume(self, checkpoints: Checkpoints) -> None:
        state = checkpoints.state
        self.step, self.scale, self.finite_steps = state["step"], state["scale"], state["finite_steps"]
        self.curve = Curve.from_tree(state["curve"])
        if self.curve.stopped:
            self._load_best()
        else:
            checkpoints.read(self.step, self._tensors())

    def _state(self) -> dict[str, Any]:
        numbers = {"step": self.step, "scale": self.scale, "finite_steps": self.finite_steps}
        return {**numbers, "curve": self.curve.to_tree()}

    def _tensors(self) -> dict[str, Tensor]:
        """What the steps change."""
        tensors: dict[str, Tensor] = {}
        for name, p in self.trained.items():
            tensors[f"parameter.{name}"] = p.detach()
            tensors |= {f"{key}.{name}": value for key, value in self.optimizer.state[p].items()}
        return tensors

    def _identity(self) -> str:
        """Of the run: another one cannot go on from its checkpoints."""
        shapes = [(name, list(p.shape)) for name, p in self.trained.items()]
        run = [self.name, self.options.deciding(), self.order.rows, self.held_out, shapes]
        return hashlib.sha256(json.dumps(run).encode()).hexdigest()

    # What is said

    def _report(self) -> None:
        self._measure()
        self.reported_s = self.curve.wall_s
        if self.world.main:
            self.progress(self.name, self.step, self.total, self.curve.describe(self.step))

    def _measure(self) -> None:
        self.curve.wall_s = time.perf_counter() - self.started_s
        on_gpu = self.world.device.type == "cuda"
        self.curve.peak_memory_bytes = torch.cuda.max_memory_allocated() if on_gpu else peak_memory_bytes()

    def _check_loss(self) -> None:
        loss = self.curve.train[-1][1]
        if not math.isfinite(loss):
            raise self._stopped(f"the loss is {loss}")
        if self.curve.exploded:
            raise self._stopped(self.curve.exploded)

    def _stopped(self, reason: str) -> TrainingError:
        kept = ""
        if self.checkpoints and self.checkpoints.step is not None:
            step, folder = self.checkpoints.step, self.checkpoints.folder
            kept = f"; the last good checkpoint, of step {step}, is kept in {folder}"
        hint = f"a smaller learning rate than lr={self.options.lr:g}, or a longer warm-up; with --force"
        return TrainingError(f"training stopped at step {self.step}: {reason}{kept}", hint)


def _gradient(parameter: Tensor) -> Tensor:
    """Zero where no row of this step asked for the parameter, which moves on as others do."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
