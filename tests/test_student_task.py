"""The loss of a student: what the formula says, token by token, whatever rows go together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qtool.checkpoint.reader import Checkpoint
from qtool.errors import UsageError
from qtool.formats.weights import Weights
from qtool.models.architectures import ARCHITECTURES
from qtool.models.whole import WholeModel
from qtool.training import losses
from qtool.training.losses import divergence, top_k
from qtool.training.objective import Objective
from qtool.training.task import StudentTask, evenly
from qtool.training.teacher import HiddenTeacher, LiveTeacher, Teacher, TopKTeacher
from tests.conftest import MakeModel
from tests.test_blockwise import CPU, open_model
from tests.test_teachers import DOCUMENTS, LENGTHS, load, make_rows

TEACHER, STUDENT = {"tied": False}, {"num_hidden_layers": 1}
MakeTask = Callable[..., StudentTask]


@pytest.fixture
def make_task(make_model: MakeModel, tmp_path: Path) -> MakeTask:
    """A student of one layer, all of it trained, its teacher of two, and seven rows."""

    def make(objective: Objective, teacher: str = "hidden", documents: bool = True, **fields: Any) -> StudentTask:
        rows, all_positions = make_rows()
        positions = all_positions if documents else None
        student = load(make_model(**{**STUDENT, **fields})).requires_grad_(True)
        path = make_model(**TEACHER)
        taught: dict[str, Callable[[], Teacher | None]] = {
            "none": lambda: None,
            "live": lambda: LiveTeacher(load(path)),
            "hidden": lambda: HiddenTeacher(open_model(path), rows, positions),
            "top": lambda: TopKTeacher(
                open_model(path), rows, positions, k=6, folder=tmp_path / "top", temperature=objective.check_cached()
            ),
        }
        return StudentTask(student, taught[teacher](), objective, rows, positions)

    return make


def documents_of(task: StudentTask, index: int) -> list[Tensor]:
    """The documents of a row, or the row where they are not told apart."""
    rows, _ = make_rows()
    counts = DOCUMENTS.get(index, [len(rows[index])]) if task._positions else [len(rows[index])]
    return list(rows[index].split(counts))


def naive_loss(task: StudentTask, teacher: WholeModel, index: int, share: float) -> tuple[float, int]:
    """The loss of one row, every document by itself, token by token, without states."""
    objective = task.objective
    alpha, temperature = objective.alpha_at(share), objective.temperature_at(share)
    total, terms = 0.0, 0
    for document in documents_of(task, index):
        with torch.no_grad():
            ours, theirs = (model(document[None])[0].double() for model in (task.student, teacher))
        for place in range(len(document) - 1):
            z, known = ours[place][None], theirs[place][None]
            k = objective.top_k
            if alpha < 1:
                total += (1 - alpha) * float(z.logsumexp(1) - z[0, document[place + 1]])
            if objective.divergence != "none":
                apart = divergence(objective.divergence, z, top_k(known, k, temperature) if k else known, temperature)
                total += alpha * temperature**2 * float(apart)
            terms += 1
    return total, terms


OBJECTIVES = {
    "kl": (Objective(), "hidden"),
    "kl at 3, and the true tokens": (Objective(alpha=0.7, temperature=3), "hidden"),
    "reverse": (Objective(divergence="reverse-kl", alpha=0.5), "live"),
    "jsd of the top": (Objective(divergence="jsd", alpha=0.5, top_k=6, temperature=2), "live"),
    "top of a cache": (Objective(alpha=0.9, top_k=6, temperature=2), "top"),
    "cross entropy": (Objective(alpha=0), "none"),
    "cross entropy alone": (Objective(divergence="none", alpha=0), "none"),
    "schedules": (Objective(alpha="1:0.2", temperature="4:1"), "hidden"),
}


@pytest.mark.parametrize("documents", [True, False], ids=["documents", "whole rows"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_is_its_formula(make_model: MakeModel, make_task: MakeTask, name: str, documents: bool) -> None:
    objective, kind = OBJECTIVES[name]
    task, teacher = make_task(objective, kind, documents), load(make_model(**TEACHER))
    task.schedule(0.25)
    for indexes in ([1], [4, 0, 2], list(range(7))):
        expected = [naive_loss(task, teacher, index, 0.25) for index in indexes]
        total, terms = task(indexes)
        assert total.dtype == torch.float32
        assert terms.item() == sum(count for _, count in expected)
        assert total.item() == pytest.approx(sum(loss for loss, _ in expected), rel=1e-5)
    every = sum(LENGTHS) - len(LENGTHS)
    assert terms.item() == every - (sum(len(counts) - 1 for counts in DOCUMENTS.values()) if documents else 0)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_rows_do_not_depend_on_who_goes_with_them(make_task: MakeTask, kind: str) -> None:
    """Padding, too, changes nothing: neither losses nor gradients."""
    fields = {"layer_types": ["sliding_attention"]} if kind == "gemma3_text" else {}
    task = make_task(Objective(alpha=0.5, temperature=2), kind=kind, **fields)

    def gradients(*calls: list[int]) -> tuple[float, int, list[Tensor]]:
        task.zero_grad()
        loss, terms = 0.0, 0
        for indexes in calls:
            total, count = task(indexes)
            total.backward()
            loss, terms = loss + total.item(), terms + int(count)
        return loss, terms, [p.grad.clone() for p in task.parameters() if p.grad is not None]

    together, alone = gradients([2, 1, 4]), gradients([4], [2], [1], [])
    assert together[0] == pytest.approx(alone[0], rel=1e-5)
    assert together[1] == alone[1]
    assert len(together[2]) == len(alone[2]) == len(list(task.parameters()))
    for a, b in zip(together[2], alone[2], strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(1.0, float(a.abs().max())), f"{(a - b).abs().max():.3e}"


def test_no_rows_are_nothing_through_the_whole_model(make_task: MakeTask) -> None:
    """Where processes share a batch, one may get no row, but must run what the others do."""
    for teacher in ("none", "hidden", "live"):
        states = {"hidden": 1.0, "attention": 1.0} if teacher == "live" else {}
        task = make_task(Objective(alpha=0 if teacher == "none" else 0.5, **states), teacher)
        total, terms = task([])
        total.backward()
        assert (total.item(), terms.item()) == (0, 0)
        assert all(p.grad is not None and not p.grad.any() for p in task.parameters())


@pytest.mark.parametrize("name", ["kl", "jsd of the top", "top of a cache", "cross entropy"])
def test_slices_of_tokens_change_nothing(make_task: MakeTask, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    objective, kind = OBJECTIVES[name]
    task, found = make_task(objective, kind), []
    for step in (10**6, 320 * 7):
        monkeypatch.setitem(losses.SLICE_LOGITS, "cpu", step)
        task.zero_grad()
        total, _ = task([0, 1, 4])
        total.backward()
        found.append((total.item(), [p.grad.clone() for p in task.parameters() if p.grad is not None]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(1.0, float(a.abs().max()))


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Squared error over square, of one state."""
    return float((ours - theirs).square().sum() / theirs.square().sum())


@pytest.mark.parametrize("width", [64, 32])
@pytest.mark.parametrize(("hidden", "attention"), [(0.5, 0.0), (0.0, 2.0), (0.5, 2.0)])
def test_errors_of_states(
    make_model: MakeModel, make_task: MakeTask, width: int, hidden: float, attention: float
) -> None:
    objective = Objective(alpha=0, hidden=hidden, attention=attention)
    task = make_task(objective, "live", hidden_size=width, num_hidden_layers=2, head_dim=16)
    without = make_task(Objective(alpha=0), "none", hidden_size=width, num_hidden_layers=2, head_dim=16)
    teacher = load(make_model(**TEACHER))
    projections = [m for m in task.modules() if isinstance(m, nn.Linear) and m not in set(task.student.modules())]
    assert len(projections) == (0 if width == 64 else 2 * (bool(hidden) + bool(attention)))
    expected = 0.0
    for index in (1, 2):
        for document in documents_of(task, index):
            with task.student.watch([0, 1], [0, 1]) as ours, teacher.watch([0, 1], [0, 1]) as theirs, torch.no_grad():
                task.student.hidden(document[None])
                teacher.hidden(document[None])
                for place in range(len(document) - 1):
                    for i in range(2):
                        if hidden:
                            state = task.project_hidden[i](ours.hidden[i][0, place])
                            expected += hidden / 2 * relative(state, theirs.hidden[i][0, place])
                        if attention:
                            state = task.project_attention[i](ours.attention[i][0, place])
                            expected += attention / 2 * relative(state, theirs.attention[i][0, place])
    total, terms = task([1, 2])
    plain, same_terms = without([1, 2])
    assert (total - plain).item() == pytest.approx(expected, rel=1e-4)
    assert terms == same_terms
    total.backward()
    assert all(p.weight.grad is not None and p.weight.grad.any() for p in projections)
    grouped = {p for group in task.groups() for p in group["params"]}
    assert grouped == set(task.parameters()) == {*task.student.parameters(), *(p.weight for p in projections)}
    with torch.no_grad():
        assert task([1, 2])[0].item() == pytest.approx(plain.item()), "held-out losses are without them"


def test_states_alone_are_an_objective(make_task: MakeTask) -> None:
    task = make_task(Objective(divergence="none", hidden=1.0), "live")
    total, _ = task([0])
    total.backward()
    with torch.no_grad():
        assert task([0])[0].item() == pytest.approx(total.item()), "then they are what is measured"
    assert task.student.model.get_submodule("model.layers.0.mlp.up_proj").weight.grad.any()


def test_blocks_are_paired_evenly() -> None:
    assert evenly(2, 2) == [(0, 0), (1, 1)]
    assert evenly(3, 6) == [(0, 1), (1, 3), (2, 5)]
    assert evenly(2, 3) == [(0, 1), (1, 2)]
    assert evenly(4, 2) == [(0, 0), (1, 0), (2, 1), (3, 1)]


def test_pairs_of_blocks_may_be_given(make_model: MakeModel) -> None:
    rows, positions = make_rows()
    teacher = LiveTeacher(load(make_model(**TEACHER)))
    student = load(make_model(**TEACHER))
    objective = Objective(divergence="none", hidden=1.0)
    found = {}
    for pairs in ([(1, 1), (0, 0)], [(0, 1), (1, 0)], [(1, 0)]):
        task = StudentTask(student.requires_grad_(True), teacher, objective, rows, positions, pairs=pairs)
        found[str(pairs)] = task([0])[0].item()
    assert found["[(1, 1), (0, 0)]"] == pytest.approx(0, abs=1e-6)
    assert found["[(0, 1), (1, 0)]"] > 0.1
    assert found["[(1, 0)]"] > 0.1


def test_held_out_losses_are_those_of_the_last_step(make_task: MakeTask) -> None:
    task, last = make_task(Objective(alpha="1:0.2", temperature="4:1")), make_task(Objective(alpha=0.2))
    expected = last([1, 4])[0].item()
    for share in (0.0, 0.5, 1.0):
        task.schedule(share)
        with torch.no_grad():
            assert task([1, 4])[0].item() == expected
        assert (task([1, 4])[0].item() == expected) == (share == 1)


def test_only_what_is_marked_is_trained(make_task: MakeTask) -> None:
    task = make_task(Objective())
    everything = {name for name, _ in task.student.named_parameters()}
    assert {name for name, _ in task.named_parameters()} == {f"student.{name}" for name in everything}, "no teacher"
    task.student.requires_grad_(False)
    norms = [m.weight for n, m in task.student.named_modules() if n.endswith("layernorm")]
    for weight in norms:
        weight.requires_grad_(True)
    (group,) = task.groups()
    assert set(group["params"]) == set(norms)
    assert group["weight_decay"] == 0
    total, _ = task([1])
    total.backward()
    assert all((p.grad is not None) == p.requires_grad for p in task.parameters())
    assert task.units() == task.student.blocks
    assert task.rows == 7


@pytest.mark.parametrize("name", ["kl", "reverse", "jsd of the top", "top of a cache", "cross entropy"])
def test_a_student_learns(make_task: MakeTask, name: str) -> None:
    objective, kind = OBJECTIVES[name]
    task = make_task(objective, kind)
    task.student.recompute()
    optimizer = torch.optim.AdamW(task.groups(), lr=3e-3, weight_decay=0.0)
    with torch.no_grad():
        before = task(list(range(7)))[0].item()
    for _ in range(12):
        total, terms = task(list(range(7)))
        (total / terms).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        after = task(list(range(7)))[0].item()
    assert after < 0.8 * before, (before, after)


def test_mixed_precision_is_near(make_task: MakeTask) -> None:
    task = make_task(Objective(alpha=0.5))
    task.student.recompute()
    exact, _ = task([1, 4])
    with torch.autocast("cpu", torch.bfloat16):
        near, _ = task([1, 4])
    near.backward()
    assert near.dtype == torch.float32
    assert 0 < abs(near.item() / exact.item() - 1) < 0.02
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in task.parameters())


def test_what_a_teacher_cannot_say(make_model: MakeModel, make_task: MakeTask, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"divergence `kl` with alpha 1\.0 needs a teacher"):
        make_task(Objective(), "none")
    with pytest.raises(UsageError, match="learned from a teacher in memory, not from a cache"):
        make_task(Objective(hidden=1.0), "hidden")
    rows, _ = make_rows()
    cached = TopKTeacher(open_model(make_model(**TEACHER)), rows, k=3, folder=tmp_path, temperature=2.0)
    student = WholeModel(make_model(**STUDENT), Weights(Checkpoint(make_model(**STUDENT))), CPU)
    for temperature in ("1", "2:1"):
        with pytest.raises(UsageError, match=rf"cached teacher is for temperature 2\.0, not for {temperature}"):
            StudentTask(student, cached, Objective(temperature=temperature), rows)
    assert StudentTask(student, cached, Objective(temperature=2), rows)([0])[1] == LENGTHS[0] - 1
