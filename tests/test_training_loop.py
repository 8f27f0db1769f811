"""The training loop against AdamW written out, its rows and rates, what it keeps, and what it survives."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from qtool.errors import QtoolError, TrainingError, UsageError
from qtool.training import checkpoints, loop
from qtool.training.batches import Order, parts
from qtool.training.curve import Curve
from qtool.training.loop import Task, train
from qtool.training.options import MEMORY_ONLY, Training
from qtool.training.world import World

ROWS, TERMS, INPUTS, OUTPUTS = 23, 5, 4, 3
HELD_OUT, TRAINED = list(range(4)), list(range(4, ROWS))
ALONE = World()


def quiet(stage: str, done: int, total: int, detail: str) -> None:
    """A progress callback that tells nobody."""


class Fit(Task):
    """A regression whose rows have one to five terms; the last bias is frozen. `meddle` may change a loss."""

    def __init__(self, meddle: Callable[[int, Tensor], Tensor] = lambda call, loss: loss) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.rows = ROWS
        self.inputs_RTI = torch.randn(ROWS, TERMS, INPUTS, generator=generator)
        self.targets_RTO = torch.randn(ROWS, TERMS, OUTPUTS, generator=generator)
        self.there_RT = torch.arange(TERMS) <= torch.arange(ROWS)[:, None] % TERMS
        self.first, self.last = nn.Linear(INPUTS, 6), nn.Linear(6, OUTPUTS)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 2
        self.last.bias.requires_grad_(False)
        self.meddle, self.calls = meddle, 0
        self.shares: list[float] = []

    def forward(self, indexes: list[int]) -> tuple[Tensor, Tensor]:
        self.calls += torch.is_grad_enabled()
        there_RT = self.there_RT[indexes]
        outputs_RTO = self.last(torch.tanh(self.first(self.inputs_RTI[indexes])))
        loss_RT = (outputs_RTO.float() - self.targets_RTO[indexes]).square().sum(-1) / 10
        loss = (loss_RT * there_RT).sum()
        return self.meddle(self.calls, loss) if torch.is_grad_enabled() else loss, there_RT.sum()

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.first.weight, self.last.weight]}, {"params": [self.first.bias], "lr_scale": 0.1}]

    def schedule(self, share: float) -> None:
        self.shares.append(share)

    @property
    def state(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.named_parameters()}


def fit(
    task: Task,
    options: Training,
    folder: Path | None = None,
    progress: loop.Progress = quiet,
    held_out: Sequence[int] = HELD_OUT,
) -> Curve:
    return train(task, options, ALONE, folder, progress, "fit", list(held_out), TRAINED)


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def losses(curve: Curve) -> tuple[object, ...]:
    return curve.train, curve.held_out, curve.best_step, curve.tokens, curve.skipped, curve.stopped


SHORT = Training(epochs=3, batch=4, lr=0.01, warmup=0.2, evaluate_every=4)  # 15 steps


# The steps themselves


@pytest.mark.parametrize(
    "options",
    [
        SHORT,
        Training(steps=9, batch=5, lr=0.05, clip=0.3, weight_decay=0.1, schedule="linear", seed=3),
        Training(steps=7, batch=2, lr=0.02, clip=0.0, warmup=0.0, schedule="constant", accumulate=2),
    ],
)
def test_against_adamw_written_out(options: Training) -> None:
    """Decoupled weight decay (arXiv 1711.05101, alg. 2), and the gradient of the mean over all terms, clipped."""
    task, naive = Fit(), Fit().double()
    naive.inputs_RTI, naive.targets_RTO = naive.inputs_RTI.double(), naive.targets_RTO.double()
    naive_losses = []
    total = options.total_steps(len(TRAINED))
    order = Order(TRAINED, options.total_rows(len(TRAINED)), options.seed)
    trained = {"first.weight": 1.0, "last.weight": 1.0, "first.bias": 0.1}
    moments = {name: [torch.zeros_like(naive.get_parameter(name)) for _ in range(2)] for name in trained}
    for step in range(total):
        rows = order.batch(step, options.batch)
        outputs_RTO = naive.last(torch.tanh(naive.first(naive.inputs_RTI[rows])))
        error_RT = (outputs_RTO - naive.targets_RTO[rows]).square().sum(-1) / 10
        loss = error_RT[naive.there_RT[rows]].mean()
        naive_losses.append(loss.item())
        gradients = dict(
            zip(trained, torch.autograd.grad(loss, [naive.get_parameter(n) for n in trained]), strict=True)
        )
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
        clip = min(1.0, options.clip / norm) if options.clip else 1.0
        warm = round(options.warmup * total)
        share = (step - warm) / max(total - warm, 1)
        falling = {"cosine": 0.5 + 0.5 * math.cos(math.pi * share), "linear": 1 - share, "constant": 1.0}
        rate = (step + 1) / (warm + 1) if step < warm else falling[options.schedule]
        for name, lr_scale in trained.items():
            weight, gradient = naive.get_parameter(name).data, gradients[name] * clip
            first, second = moments[name]
            first.copy_(0.9 * first + 0.1 * gradient)
            second.copy_(0.999 * second + 0.001 * gradient.square())
            move = (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            weight -= options.lr * rate * lr_scale * (move + options.weight_decay * weight)
    curve = fit(task, options, held_out=())
    torch.testing.assert_close([loss for _, loss in curve.train], naive_losses, rtol=1e-5, atol=0)
    for name, value in naive.state.items():
        torch.testing.assert_close(task.state[name].double(), value, rtol=1e-4, atol=1e-5)
    assert (curve.stopped, curve.best_step, len(curve.train)) == ("end", total, total)
    assert torch.equal(task.last.bias, Fit().last.bias), "what is frozen stays"


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_parts_of_a_batch_change_nothing_but_rounding(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although their rows have different numbers of terms. The scale is so low that fp16 skips no step."""
    monkeypatch.setattr(loop, "FIRST_SCALE", 2.0**10)
    options = dataclasses.replace(SHORT, precision=precision)
    task = Fit()
    curve = fit(task, options)
    # a product is rounded to 16 bits in sums of different order: 2^-8 relative for bf16
    tolerance = {"float32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}[precision]
    for accumulate in (2, 3, 50):
        other = Fit()
        again = fit(other, dataclasses.replace(options, accumulate=accumulate))
        for name, value in task.state.items():
            torch.testing.assert_close(other.state[name], value, rtol=tolerance, atol=tolerance)
        assert again.tokens == curve.tokens
        torch.testing.assert_close(again.train, curve.train, rtol=tolerance, atol=0)


def test_the_same_run_gives_the_same_bytes() -> None:
    first, second = Fit(), Fit()
    assert losses(fit(first, SHORT)) == losses(fit(second, SHORT))
    assert same(first.state, second.state)
    other = Fit()
    fit(other, dataclasses.replace(SHORT, seed=1))
    assert not same(first.state, other.state)


def test_mixed_precision_is_near_float32() -> None:
    exact = fit(Fit(), SHORT)
    for precision in ("bf16", "fp16"):
        task = Fit()
        curve = fit(task, dataclasses.replace(SHORT, precision=precision))
        assert curve.train != exact.train
        torch.testing.assert_close(curve.train, exact.train, rtol=0.02, atol=0)
        assert {value.dtype for value in task.state.values()} == {torch.float32}


# Rows and rates


@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 4), st.integers(0, 5))
def test_epochs_hold_every_row_once_in_any_batches(rows: int, size: int, epochs: int, seed: int) -> None:
    names = [7 * row for row in range(rows)]
    options = Training(epochs=epochs, batch=size, seed=seed)
    order = Order(names, options.total_rows(rows), seed)
    steps = options.total_steps(rows)
    flat = [row for step in range(steps) for row in order.batch(step, size)]
    for epoch in range(epochs):
        assert sorted(flat[epoch * rows : (epoch + 1) * rows]) == names
    assert len(flat) == epochs * rows
    assert order.batch(steps - 1, size), "the last batch is not empty"
    one_by_one = Order(names, options.total_rows(rows), seed)
    assert [one_by_one.batch(place, 1)[0] for place in reversed(range(len(flat)))] == flat[::-1]


def test_epochs_differ_and_seeds_do() -> None:
    order, other = Order(list(range(20)), 40, 0), Order(list(range(20)), 40, 1)
    assert order.batch(0, 20) != order.batch(1, 20)
    assert order.batch(0, 20) != other.batch(0, 20)
    assert order.batch(0, 20) != list(range(20))


@given(st.lists(st.integers(), min_size=1, max_size=20, unique=True), st.integers(1, 8), st.integers(1, 5))
def test_parts_of_processes_are_the_batch(batch: list[int], most: int, processes: int) -> None:
    shares = [parts(batch, most, rank, processes) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1, "every process runs the model equally often"
    assert 1 <= len(shares[0]) <= most
    assert all(indexes for share in shares for indexes, _ in share)
    counted = [row for share in shares for indexes, weight in share if weight for row in indexes]
    assert sorted(counted) == sorted(batch)
    sizes = [len(indexes) * weight for share in shares for indexes, weight in share]
    assert max(sizes) - min(sizes) <= 2


def test_how_many_steps() -> None:
    assert Training(batch=8).total_steps(17) == 3
    assert Training(batch=8, epochs=2).total_steps(17) == 5
    assert Training(batch=8, epochs=2, steps=4).total_steps(17) == 4
    assert Training(batch=8, epochs=2, steps=40).total_steps(17) == 5
    assert Training(batch=8, steps=40).total_steps(17) == 40, "without epochs, rows come as often as it takes"
    assert [Training().evaluation_steps(total) for total in (0, 3, 80, 81)] == [1, 1, 10, 11]


@given(st.integers(1, 200), st.floats(0, 1), st.sampled_from(["cosine", "linear", "constant"]))
def test_the_rate_rises_and_then_falls(total: int, warmup: float, schedule: str) -> None:
    options = Training(warmup=warmup, schedule=schedule)
    rates = [options.rate(step, total) for step in range(total)]
    warm = round(warmup * total)
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[:warm] == sorted(set(rates[:warm]))
    assert rates[warm:] == sorted(rates[warm:], reverse=True)
    if warm < total:
        assert rates[warm] == 1


def test_rates_worked_by_hand() -> None:
    linear = [Training(warmup=0.25, schedule="linear").rate(step, 8) for step in range(8)]
    assert linear == pytest.approx([1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    cosine = [Training(warmup=0.0).rate(step, 4) for step in range(4)]
    assert cosine == pytest.approx([1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"accumulate": 0}, "accumulate=0 must be at least 1"),
        ({"patience": 0}, "patience=0 must be at least 1"),
        ({"clip": -1.0}, "clip=-1.0 must not be negative"),
        ({"held_out": -1}, "held_out=-1 must not be negative"),
        ({"lr": 0.0}, "lr=0.0 must be positive"),
        ({"lr": math.nan}, "lr=nan must be positive"),
        ({"warmup": 5}, "warmup=5 is a share of the steps, from 0 to 1"),
        ({"schedule": "cosin"}, "unknown schedule `cosin`"),
        ({"precision": "fp8"}, "unknown precision `fp8`"),
    ],
)
def test_options_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        Training(**values)


# What is kept


def test_the_best_state_is_the_one_that_stays(tmp_path: Path) -> None:
    """With a rate at which the held-out loss first falls and then rises again."""
    options = Training(epochs=12, batch=4, lr=0.1, schedule="constant", evaluate_every=5)
    task, in_memory = Fit(), Fit()
    curve = fit(task, options, tmp_path / "run")
    assert losses(fit(in_memory, options)) == losses(curve)
    assert same(in_memory.state, task.state)
    best = min(loss for _, loss in curve.held_out)
    assert (curve.best_held_out, dict(curve.held_out)[curve.best_step]) == (best, best)
    assert 0 < curve.best_step < curve.steps
    loss, terms = task(HELD_OUT)
    assert (loss / terms).item() == pytest.approx(best, rel=1e-6)
    assert curve.held_out[0][0] == 0
    assert curve.held_out[-1][0] == curve.steps


@pytest.mark.parametrize("stored", [False, True])
def test_training_that_only_harms_ends_where_it_began(tmp_path: Path, stored: bool) -> None:
    task = Fit(lambda call, loss: -0.01 * loss)
    curve = fit(task, SHORT, tmp_path if stored else None)
    assert curve.best_step == 0
    assert same(task.state, Fit().state)


def test_patience(tmp_path: Path) -> None:
    task = Fit(lambda call, loss: loss if call <= 4 else -loss)
    options = dataclasses.replace(SHORT, evaluate_every=1, patience=2)
    curve = fit(task, options, tmp_path)
    assert curve.stopped == "patience"
    assert curve.best_step == curve.evaluated - 2
    assert task.calls == curve.evaluated == len(curve.train) < curve.steps
    again = Fit()
    assert losses(fit(again, options, tmp_path)) == losses(curve)
    assert same(again.state, task.state)
    assert again.calls == 0


def test_evaluations_see_the_end_of_the_schedule() -> None:
    task = Fit()
    curve = fit(task, dataclasses.replace(SHORT, evaluate_every=5))
    assert curve.steps == 15
    steps = [step / 15 for step in range(15)]
    assert task.shares == [1, *steps[:5], 1, *steps[5:10], 1, *steps[10:], 1]


def test_checkpoints_hold_no_more_than_they_need(tmp_path: Path) -> None:
    seen: list[set[str]] = []
    fit(
        Fit(),
        dataclasses.replace(SHORT, evaluate_every=1, checkpoint_every=6),
        tmp_path,
        lambda *_: seen.append({path.name for path in tmp_path.iterdir()}),
    )
    assert max(map(len, seen)) <= 4, "state, tensors, the best of then and of now"
    assert len(list(tmp_path.iterdir())) == 3
    state = json.loads((tmp_path / "state.json").read_text())
    assert Curve.from_tree(state["curve"]).stopped == "end"


# What it survives


class KilledError(Exception):
    """The process is gone."""


def interrupted(options: Training, folder: Path, at_call: int) -> None:
    def kill(call: int, loss: Tensor) -> Tensor:
        if call == at_call:
            raise KilledError
        return loss

    with pytest.raises(KilledError):
        fit(Fit(kill), options, folder)


@pytest.mark.parametrize("at_call", [1, 4, 5, 9, 15])
@pytest.mark.parametrize(
    "changes",
    [{}, {"checkpoint_every": 3}, {"checkpoint_every": 7, "evaluate_every": 2}, {"precision": "fp16"}],
    ids=lambda changes: " ".join(changes),
)
def test_a_resumed_run_ends_with_the_same_bytes(tmp_path: Path, changes: dict[str, Any], at_call: int) -> None:
    options = dataclasses.replace(SHORT, **changes)
    whole, resumed = Fit(), Fit()
    curve = fit(whole, options, tmp_path / "whole")
    interrupted(options, tmp_path / "run", at_call)
    again = fit(resumed, options, tmp_path / "run")
    assert losses(again) == losses(curve)
    assert same(resumed.state, whole.state)
    every = options.checkpoint_every or options.evaluate_every or 0
    assert resumed.calls == 15 - (at_call - 1) // every * every, "steps before the last checkpoint are not run again"
    best = f"best-{curve.best_step}.safetensors"
    assert (tmp_path / "run" / best).read_bytes() == (tmp_path / "whole" / best).read_bytes()


def test_killed_at_any_moment_of_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was not yet on disk is cut off, and the rest of the run is as if nothing had been."""
    options = dataclasses.replace(SHORT, evaluate_every=5)
    whole = Fit()
    curve = fit(whole, options, tmp_path / "whole")
    real, count = checkpoints.fsync, 0

    def failing(path: Path, moment: int) -> None:
        nonlocal count
        count += 1
        if count == moment:
            if path.is_file():
                path.write_bytes(path.read_bytes()[:-7])
            raise KilledError
        real(path)

    for moment in range(1, 100):
        count, folder = 0, tmp_path / str(moment)
        monkeypatch.setattr(checkpoints, "fsync", lambda path, moment=moment: failing(path, moment))
        try:
            fit(Fit(), options, folder)
        except KilledError:
            pass
        else:
            break
        monkeypatch.setattr(checkpoints, "fsync", real)
        resumed = Fit()
        assert losses(fit(resumed, options, folder)) == losses(curve), moment
        assert same(resumed.state, whole.state), moment
    assert moment > 10


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    first, second = Fit(), Fit()
    curve = fit(first, SHORT, tmp_path)
    assert fit(second, SHORT, tmp_path) == curve
    assert second.calls == 0
    assert same(first.state, second.state)
    last, again = Fit(), Fit()
    fit(last, SHORT, tmp_path / "no evaluation", held_out=())
    assert fit(again, SHORT, tmp_path / "no evaluation", held_out=()).stopped == "end"
    assert same(last.state, again.state)


def test_checkpoints_of_another_run_are_refused(tmp_path: Path) -> None:
    interrupted(SHORT, tmp_path, 9)
    for changes in ({"lr": 0.02}, {"epochs": 4}, {"seed": 1}, {"precision": "bf16"}):
        with pytest.raises(QtoolError, match="holds a training with other options or rows"):
            fit(Fit(), dataclasses.replace(SHORT, **changes), tmp_path)
    with pytest.raises(QtoolError, match="holds a training with other options or rows"):
        fit(Fit(), SHORT, tmp_path, held_out=[1])
    changes = {"accumulate": 2, "recompute": False, "checkpoint_every": 1}
    assert set(changes) == set(MEMORY_ONLY)
    assert fit(Fit(), dataclasses.replace(SHORT, **changes), tmp_path).stopped == "end"


# What stops it


class InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * math.inf


@pytest.mark.parametrize(
    ("meddle", "reason"),
    [
        (lambda loss: loss * math.nan, "the loss is nan"),
        (lambda loss: loss + math.inf, "the loss is inf"),
        (InfiniteGradient.apply, r"the norm of the gradient is (nan|inf)"),
    ],
)
def test_what_is_not_finite_stops_it(tmp_path: Path, meddle: Callable[[Tensor], Tensor], reason: str) -> None:
    task = Fit(lambda call, loss: meddle(loss) if call == 11 else loss)
    kept = re.escape(f"; the last good checkpoint, of step 8, is kept in {tmp_path}")
    with pytest.raises(TrainingError, match=f"^training stopped at step 11: {reason}{kept}$") as caught:
        fit(task, SHORT, tmp_path)
    assert caught.value.exit_code == 1
    assert caught.value.hint == "a smaller learning rate than lr=0.01, or a longer warm-up; with --force"
    assert all(value.isfinite().all() for value in task.state.values()), "no step is made with it"
    resumed, whole = Fit(), Fit()
    assert losses(fit(resumed, SHORT, tmp_path)) == losses(fit(whole, SHORT))
    assert same(resumed.state, whole.state)


def test_nothing_is_promised_that_is_not_there(tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        with pytest.raises(TrainingError, match=r"^training stopped at step 2: the loss is nan$"):
            fit(Fit(lambda call, loss: loss * math.nan if call == 2 else loss), SHORT, folder)


def test_an_exploding_loss_stops_it() -> None:
    with pytest.raises(TrainingError, match=r"the loss has exploded from \d\.\d+ to \d+\.\d+"):
        fit(Fit(lambda call, loss: loss * 1.5**call), SHORT)
    curve = Curve(steps=20, lr=1.0)
    for step in range(1, 17):
        curve.train.append((step, 2.0 if step <= 8 else 5.0))
        assert not curve.exploded
    curve.train.append((17, 5.01))
    assert curve.exploded == "the loss has exploded from 2 to 5.001"


def test_fp16_skips_what_overflows(tmp_path: Path) -> None:
    """A gradient of 2^12 overflows when it is scaled by 2^16: until the scale is low enough, nothing moves."""

    class Steep(Fit):
        def forward(self, indexes: list[int]) -> tuple[Tensor, Tensor]:
            loss, terms = super().forward(indexes)
            return loss + (self.first(self.inputs_RTI[indexes]) * 2.0**12).float().sum(), terms

    task, short = Steep(), Steep()
    options = Training(steps=30, batch=4, precision="fp16", evaluate_every=30, checkpoint_every=29)
    curve = fit(short, dataclasses.replace(options, steps=4), held_out=())
    assert (curve.skipped, len(curve.train)) == (4, 4)
    assert same(short.state, Steep().state)
    task.meddle = lambda call, loss: loss * math.nan if call == 30 else loss
    with pytest.raises(TrainingError):
        fit(task, options, tmp_path, held_out=())
    curve = Curve.from_tree(json.loads((tmp_path / "state.json").read_text())["curve"])
    assert 5 <= curve.skipped <= 16
    assert load_file(tmp_path / "step-29.safetensors")["step.first.bias"] == 29 - curve.skipped
    assert all(value.isfinite().all() for value in task.state.values())
    assert not same(task.state, short.state)


def test_fp16_gives_up_when_the_smallest_scale_overflows() -> None:
    task = Fit(lambda call, loss: InfiniteGradient.apply(loss))
    with pytest.raises(TrainingError, match=r"^training stopped at step 17: the norm of the gradient is (nan|inf)"):
        fit(task, Training(steps=40, precision="fp16"))
    assert same(task.state, Fit().state)


def test_the_scale_of_fp16_grows_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loop, "GROWTH_STEPS", 4)
    options = dataclasses.replace(SHORT, precision="fp16")
    scales = []
    for at_call in (9, 13):
        interrupted(options, tmp_path / str(at_call), at_call)
        state = json.loads((tmp_path / str(at_call) / "state.json").read_text())
        scales.append(state["scale"])
    assert scales == [2.0**18, 2.0**19]


# What is said


def test_progress_and_the_curve() -> None:
    lines: list[tuple[str, int, int, str]] = []
    curve = fit(Fit(), SHORT, progress=lambda *line: lines.append(line))
    assert [line[:3] for line in lines] == [("fit", step, 15) for step in (0, 4, 8, 12, 15)]
    assert re.fullmatch(r"held-out \d\.\d+, [\d.]+ [MG]B", lines[0][3])
    expected = r"loss \d\.\d+, held-out \d\.\d+, \d+ tokens/s, [\d.]+ [MG]B, [\d.]+ s left"
    assert all(re.fullmatch(expected, line[3]) for line in lines[1:]), lines
    tree = json.loads(json.dumps(curve.to_tree()))
    assert Curve.from_tree(tree) == curve
    assert tree["tokens_per_s"] == pytest.approx(curve.tokens / curve.wall_s)
    terms = sum(1 + row % TERMS for row in TRAINED)
    assert curve.tokens == 3 * terms
    assert curve.held_out[-1][1] < curve.held_out[0][1]
