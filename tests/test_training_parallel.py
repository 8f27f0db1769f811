"""Two processes train as one does. Run by torchrun, this file is what they do; the tests look at what they left.

Each process writes what it saw, and the whole parameters it ended with, for every case.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qtool.errors import TrainingError, UsageError
from qtool.training.curve import Curve
from qtool.training.loop import Task, train
from qtool.training.options import Training
from qtool.training.world import World

VOCABULARY, WIDTH, ROWS, LENGTH = 11, 7, 13, 6
HELD_OUT, TRAINED = [0, 1, 2], list(range(3, ROWS))


class Block(nn.Module):
    """A trained linear of odd shape, a frozen one, one scale, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 13), nn.Linear(13, WIDTH)
        self.scale = nn.Parameter(torch.tensor([0.7]))
        self.down.weight.requires_grad_(False)
        self.register_buffer("codes", torch.ones(3, dtype=torch.uint8))

    def forward(self, hidden_BTE: Tensor) -> Tensor:
        return hidden_BTE + self.scale * self.codes[0] * self.down(torch.tanh(self.up(hidden_BTE)))


class Small(Task):
    """A model of three blocks, recomputed, the second frozen; its head is its embedding. Row r predicts 1 + r % 5."""

    def __init__(self, meddle: Callable[[list[int], Tensor], Tensor] = lambda indexes, loss: loss) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rows = ROWS
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.rare = nn.Parameter(torch.ones(3))  # of some rows only
        self.blocks[1].requires_grad_(False)
        self.meddle = meddle

    def units(self) -> list[nn.Module]:
        return list(self.blocks)

    def forward(self, indexes: list[int]) -> tuple[Tensor, Tensor]:
        rows_B = torch.tensor(indexes)[:, None]
        tokens_BT = (torch.arange(LENGTH) * (rows_B + 1) + rows_B) % VOCABULARY
        counts_BT = torch.arange(LENGTH - 1) <= rows_B % 5
        hidden_BTE = self.embedding(tokens_BT[:, :-1])
        for block in self.blocks:
            hidden_BTE = checkpoint(block, hidden_BTE, use_reentrant=False)
        if ROWS - 1 in indexes:
            hidden_BTE = torch.where(rows_B[..., None] == ROWS - 1, self.rare.mean(), 1.0) * hidden_BTE
        logits_BTV = self.head(hidden_BTE).float()
        loss_BT = nn.functional.cross_entropy(logits_BTV.mT, tokens_BT[:, 1:], reduction="none")
        return self.meddle(indexes, (loss_BT * counts_BT).sum()), counts_BT.sum()


def bad_row(indexes: list[int], loss: Tensor) -> Tensor:
    """One process at a time meets it."""
    return loss * math.nan if 7 in indexes and torch.is_grad_enabled() else loss


def steep(indexes: list[int], loss: Tensor) -> Tensor:
    """The gradient of one row overflows in fp16 until the scale has come down."""
    if 9 not in indexes or not torch.is_grad_enabled():
        return loss
    extra = (loss / 100).half().float() * 64
    return loss + extra - extra.detach()


# 6 steps, some of which are clipped: AdamW does not see a factor that all gradients have in common
BASE = Training(epochs=3, batch=5, lr=0.02, warmup=0.2, clip=2.7, evaluate_every=2)
CASES: dict[str, tuple[Training, Callable[[list[int], Tensor], Tensor]]] = {
    "plain": (BASE, lambda indexes, loss: loss),
    # the last of 8 batches has 2 rows, that before one process has one more; in parts
    "odd": (dataclasses.replace(BASE, batch=4, accumulate=2), lambda indexes, loss: loss),
    "one row a step": (dataclasses.replace(BASE, batch=1, epochs=1), lambda indexes, loss: loss),
    "bf16": (dataclasses.replace(BASE, precision="bf16"), lambda indexes, loss: loss),
    "fp16": (dataclasses.replace(BASE, precision="fp16", epochs=6), steep),
    "nan": (dataclasses.replace(BASE, checkpoint_every=1), bad_row),
}


def run(case: str, world: World, folder: Path | None) -> tuple[Small, Curve]:
    options, meddle = CASES[case]
    task = Small(meddle)
    return task, train(task, options, world, folder, lambda *_: None, case, HELD_OUT, TRAINED)


class KilledError(Exception):
    """The process is gone."""


def interrupted(world: World, folder: Path, at_step: int) -> None:
    """A run of the first case that is killed before a step is done."""
    seen = 0

    def kill(indexes: list[int], loss: Tensor) -> Tensor:
        nonlocal seen
        seen += torch.is_grad_enabled()
        if seen == at_step:
            raise KilledError
        return loss

    with pytest.raises(KilledError):
        train(Small(kill), BASE, world, folder, lambda *_: None, "plain", HELD_OUT, TRAINED)


def work(folder: Path) -> None:
    """What each of the processes does."""
    world = World.of_environment(torch.device("cpu"))
    said: dict[str, Any] = {"size": world.size}
    for case in CASES:
        if case != "nan":
            stored = folder / "checkpoints" if case == "odd" else None
            task, curve = run(case, world, stored)
            said[case] = curve.to_tree()
            save(task, world, folder / f"{case}-{world.rank}.safetensors")
    harmed = Small(lambda _, loss: -loss if torch.is_grad_enabled() else loss)
    curve = train(harmed, BASE, world, None, lambda *_: None, "harmed", HELD_OUT, TRAINED)
    with torch.no_grad():
        loss, terms = harmed(HELD_OUT)
    said["kept"] = (loss / terms).item(), curve.held_out
    try:
        run("nan", world, folder / "nan")
    except TrainingError as error:
        said["nan"] = error.message
    task = Small()
    train(task, BASE, world, folder / "begun by one", lambda *_: None, "plain", HELD_OUT, TRAINED)
    save(task, world, folder / f"begun by one-{world.rank}.safetensors")
    interrupted(world, folder / "begun by two", 6)
    said["agreed"] = [world.agree(world.main), world.agree(not world.main), world.agree(True), world.agree(False)]
    fresh = Small()
    whole = state(fresh)
    world.shard(fresh)
    gathered = {}
    for module in (*fresh.units(), fresh):
        with world.whole(module):
            gathered |= {name: p.detach() for name, p in fresh.named_parameters() if world.full(p) is p}
            gathered = {name: p.clone() for name, p in gathered.items()}
    said["gathered"] = [name for name in whole if torch.equal(gathered[name], whole[name])]
    (folder / f"said-{world.rank}.json").write_text(json.dumps(said))
    world.barrier()
    world.close()


def save(task: Task, world: World, path: Path) -> None:
    save_file({name: world.full(p.detach()).contiguous() for name, p in task.named_parameters()}, path)


def same(left: Tensor, right: Tensor, what: str, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance, msg=lambda message: f"{what}: {message}")


def state(task: Task) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in task.named_parameters()}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have done their work."""
    folder = tmp_path_factory.mktemp("pair")
    interrupted(World(), folder / "begun by one", 4)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, __file__, str(folder)], capture_output=True, text=True, check=False, timeout=200, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def said(pair: Path, rank: int) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((pair / f"said-{rank}.json").read_text())
    return tree


# a product is rounded to 16 bits in sums of different order; and Adam's first steps magnify small differences
TOLERANCE = {"bf16": 2e-2, "fp16": 2e-2}


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case != "nan"])
def test_two_processes_train_as_one(pair: Path, case: str) -> None:
    task, curve = run(case, World(), None)
    tolerance = TOLERANCE.get(case, 2e-5)
    for rank in range(2):
        other = Curve.from_tree(said(pair, rank)[case])
        torch.testing.assert_close(other.train, curve.train, rtol=tolerance, atol=0)
        torch.testing.assert_close(other.held_out, curve.held_out, rtol=tolerance, atol=0)
        assert (other.tokens, other.skipped, other.best_step) == (curve.tokens, curve.skipped, curve.best_step)
        ended = load_file(pair / f"{case}-{rank}.safetensors")
        assert ended.keys() == state(task).keys()
        for name, value in state(task).items():
            same(ended[name], value, f"{case}, {name}", tolerance)
    assert not torch.equal(state(task)["blocks.0.up.weight"], state(Small())["blocks.0.up.weight"])
    assert torch.equal(state(task)["blocks.1.up.weight"], state(Small())["blocks.1.up.weight"])
    assert case != "fp16" or curve.skipped


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case != "nan"])
def test_processes_agree_to_the_bit(pair: Path, case: str) -> None:
    first, second = (load_file(pair / f"{case}-{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    trees = [said(pair, rank)[case] for rank in range(2)]
    for key in ("train", "held_out", "best_step", "tokens", "skipped", "stopped"):
        assert trees[0][key] == trees[1][key]
    assert said(pair, 0)["size"] == 2


@pytest.mark.slow
def test_what_one_process_meets_stops_all_at_one_step(pair: Path) -> None:
    with pytest.raises(TrainingError) as caught:
        run("nan", World(), None)
    step = re.search(r"stopped at step (\d+): the loss is nan", caught.value.message)
    assert step, caught.value.message
    for rank in range(2):
        assert said(pair, rank)["nan"].startswith(caught.value.message)
    last = int(step[1]) - 1
    assert f"of step {last}, is kept in {pair / 'nan'}" in said(pair, 0)["nan"] or last == 0


@pytest.mark.slow
def test_resumed_with_another_number_of_processes(pair: Path) -> None:
    """One begins and two end, and the reverse."""
    whole, curve = run("plain", World(), None)
    task = Small()
    again = train(task, BASE, World(), pair / "begun by two", lambda *_: None, "plain", HELD_OUT, TRAINED)
    assert again.stopped == "end"
    torch.testing.assert_close(again.train, curve.train, rtol=2e-5, atol=0)
    both = {"begun by two": state(task), "begun by one": load_file(pair / "begun by one-1.safetensors")}
    for begun, ended in both.items():
        for name, value in state(whole).items():
            same(ended[name], value, f"{begun}, {name}")


@pytest.mark.slow
def test_the_best_state_is_the_one_in_use(pair: Path) -> None:
    """And not the last that was gathered."""
    for rank in range(2):
        loss, held_out = said(pair, rank)["kept"]
        assert loss == pytest.approx(held_out[0][1], rel=1e-5)
        assert held_out[-1][1] > 1.01 * held_out[0][1]


@pytest.mark.slow
def test_checkpoints_are_whole_tensors(pair: Path) -> None:
    files = sorted(path.name for path in (pair / "checkpoints").iterdir())
    best = said(pair, 0)["odd"]["best_step"]
    assert files == sorted({f"best-{best}.safetensors", "state.json", "step-8.safetensors"})
    stored, ended = load_file(pair / "checkpoints" / f"best-{best}.safetensors"), load_file(pair / "odd-0.safetensors")
    trained = {name for name, p in Small().named_parameters() if p.requires_grad}
    assert stored.keys() == trained
    assert all(torch.equal(stored[name], ended[name]) for name in trained)


@pytest.mark.slow
def test_what_the_first_process_decides_and_what_all_gather(pair: Path) -> None:
    for rank in range(2):
        assert said(pair, rank)["agreed"] == [True, False, True, False]
        assert said(pair, rank)["gathered"] == list(state(Small()))


def test_alone_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(key, raising=False)
    world = World.of_environment(torch.device("cpu"))
    assert (world.size, world.rank, world.main) == (1, 0, True)
    world.barrier()
    world.close()
    tensor = torch.ones(2)
    assert world.sum(tensor) is tensor
    assert world.full(tensor) is tensor
    assert (world.agree(True), world.agree(False)) == (True, False)


def test_devices_that_cannot_be_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UsageError, match="several processes cannot train on mps"):
        World.of_environment(torch.device("mps"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="process 4 of this machine finds 2 GPUs") as caught:
        World.of_environment(torch.device("cuda"))
    assert caught.value.hint == "--nproc-per-node 2"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    work(Path(sys.argv[1]))
