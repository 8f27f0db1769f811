"""A student that learns from a teacher and from the texts: what the training loop is given.

Rows of a call are padded on the right to the longest: no token sees what comes after it, so padding changes nothing,
and every process runs the same blocks equally often, which FSDP wants.

Shapes: B rows, T tokens, N predicted tokens, S of a slice, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qtool.errors import UsageError
from qtool.models.whole import States, WholeModel
from qtool.training.loop import Task
from qtool.training.losses import cross_entropy, divergence, slice_tokens, state_error, summed_by_slices, top_k
from qtool.training.objective import Objective
from qtool.training.teacher import Answer, Batch, LiveTeacher, Teacher


class StudentTask(Task):
    """Trains what of the student has `requires_grad`.

    `rows` are token ids [T]; `positions`, of the same lengths, begin again at 0 with each document, whose first token
    is then not predicted. Where states are compared and widths differ, a linear projection per block is learned with
    the student, and thrown away with the task.
    """

    def __init__(
        self,
        student: WholeModel,
        teacher: Teacher | None,
        objective: Objective,
        rows: Sequence[Tensor],
        positions: Sequence[Tensor] | None = None,
        pairs: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        """`pairs`: a block of the student and the one of the teacher whose states it learns; default evenly spaced.

        Raises UsageError for a teacher that cannot say what the objective asks for.
        """
        super().__init__()
        self.student, self.objective = student, objective
        self.rows, self._rows, self._positions = len(rows), rows, positions
        self._teacher = (teacher,)  # in a tuple, so that it is no part of this module
        self.share = 0.0  # of the steps, done
        self.pairs: list[tuple[int, int]] = []
        self.project_hidden, self.project_attention = nn.ModuleList(), nn.ModuleList()
        if teacher is None:
            if objective.diverges or objective.has_states:
                raise UsageError(
                    f"divergence `{objective.divergence}` with alpha {objective.alpha} needs a teacher",
                    "`alpha` 0 is cross entropy alone",
                )
        elif objective.diverges and teacher.temperature not in (None, objective.fixed_temperature):
            raise UsageError(
                f"the cached teacher is for temperature {teacher.temperature}, not for {objective.temperature}"
            )
        if objective.has_states:
            if not isinstance(teacher, LiveTeacher):
                raise UsageError(
                    "hidden states and attention outputs are learned from a teacher in memory, not from a cache"
                )
            self.pairs = sorted(pairs or evenly(len(student.blocks), len(teacher.model.blocks)))
            widths = student.config.hidden_size, teacher.model.config.hidden_size
            generator = torch.Generator().manual_seed(0)
            for weight, projections in zip(self._weights(), (self.project_hidden, self.project_attention), strict=True):
                if weight:
                    projections.extend(_projection(*widths, generator) for _ in self.pairs)
            self.project_hidden.to(student.device)
            self.project_attention.to(student.device)

    def schedule(self, share: float) -> None:
        """What share of the steps is done, before each of them."""
        self.share = share

    def groups(self) -> list[dict[str, Any]]:
        """Matrices, and all else, which does not decay."""
        trained = [p for p in self.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trained if p.ndim > 1]},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def units(self) -> list[nn.Module]:
        """What can be sharded by itself."""
        return self.student.blocks

    def forward(self, indexes: list[int]) -> tuple[Tensor, Tensor]:
        """The summed losses of the predicted tokens of these rows, float32, and how many they are.

        Without gradient it is the loss of the last step, of distributions alone where there are any: what is measured
        stays the same while schedules go on. No rows: 0 of 0, through the whole model.
        """
        objective, learning = self.objective, torch.is_grad_enabled()
        share = self.share if learning else 1.0
        alpha, temperature = objective.alpha_at(share), objective.temperature_at(share)
        with_logits = objective.diverges or objective.has_cross_entropy
        states_count = objective.has_states and (learning or not with_logits)
        tokens_BT, positions_BT, places_N, true_N = self._batch(indexes)
        answer: Answer | None = None
        teacher = self._teacher[0]
        if teacher is not None and (objective.diverges or states_count):
            wanted = self._watched({theirs for _, theirs in self.pairs}, states_count)
            answer = teacher.answer(Batch(indexes or [0], tokens_BT, positions_BT, *wanted))
        with self.student.watch(*self._watched({ours for ours, _ in self.pairs}, states_count)) as states:
            hidden_BTE = self.student.hidden(tokens_BT, positions_BT)
        hidden_NE = hidden_BTE.flatten(0, 1).index_select(0, places_N)

        def loss(part: slice) -> Tensor:
            student_SV = self.student.logits(hidden_NE[part])
            terms: list[Tensor] = []
            if alpha < 1 or not objective.diverges:
                terms.append((1 - alpha) * cross_entropy(student_SV, true_N[part]))
            if alpha > 0 and objective.diverges:
                assert answer is not None
                said = answer.distribution(places_N[part])
                if objective.top_k and isinstance(said, Tensor):
                    said = top_k(said[:, : student_SV.shape[1]], objective.top_k, temperature)
                kind = objective.divergence
                terms.append(alpha * temperature**2 * divergence(kind, student_SV, said, temperature))
            return torch.stack(terms).sum(0)

        total = hidden_NE.new_zeros((), dtype=torch.float32)
        if with_logits:
            step = slice_tokens(self.student.device, int(self.student.config.vocab_size))
            total = total + summed_by_slices(loss, len(places_N), step)
        if states_count:
            assert answer is not None
            assert answer.states is not None
            total = total + self._states_loss(states, answer.states, places_N)
        return total, torch.tensor(len(places_N), device=total.device)

    def _batch(self, indexes: list[int]) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Tokens and positions [B, T], the places in B T from which a token is predicted, and those tokens [N]."""
        chosen = indexes or [0]
        device = self.student.device
        length = max(len(self._rows[i]) for i in chosen)
        tokens_BT, predicts_BT = (torch.zeros(len(chosen), length, dtype=torch.long) for _ in range(2))
        positions_BT = None if self._positions is None else torch.zeros_like(tokens_BT)
        for b, i in enumerate(chosen):
            last = len(self._rows[i]) - 1
            tokens_BT[b, : last + 1] = self._rows[i]
            predicts_BT[b, :last] = bool(indexes)
            if self._positions is not None and positions_BT is not None:
                positions_BT[b, : last + 1] = self._positions[i]
                predicts_BT[b, :last] *= self._positions[i][1:] != 0
        places_N = predicts_BT.flatten().nonzero()[:, 0]
        true_N = tokens_BT.flatten()[places_N + 1]
        on_device = None if positions_BT is None else positions_BT.to(device)
        return tokens_BT.to(device), on_device, places_N.to(device), true_N.to(device)

    def _watched(self, blocks: set[int], states_count: bool) -> tuple[list[int], list[int]]:
        """Of these blocks, those whose outputs and those whose attention outputs are compared."""
        hidden, attention = (sorted(blocks) if states_count and weight else [] for weight in self._weights())
        return hidden, attention

    def _weights(self) -> tuple[float, float]:
        return self.objective.hidden, self.objective.attention

    def _states_loss(self, ours: States, theirs: States, places_N: Tensor) -> Tensor:
        """The weighted errors of states, each kind averaged over the pairs, summed over tokens."""
        order = sorted({their for _, their in self.pairs})
        total = places_N.new_zeros((), dtype=torch.float32)
        kinds = (
            (self.objective.hidden, self.project_hidden, ours.hidden, theirs.hidden),
            (self.objective.attention, self.project_attention, ours.attention, theirs.attention),
        )
        for weight, projections, own, taught in kinds:
            if weight:
                for (_, their), projection, state_BTE in zip(self.pairs, projections, own, strict=True):
                    learned_NE = projection(state_BTE.flatten(0, 1).index_select(0, places_N))
                    taught_NE = taught[order.index(their)].flatten(0, 1).index_select(0, places_N)
                    total = total + weight / len(self.pairs) * state_error(learned_NE, taught_NE).sum()
        return total


def evenly(students: int, teachers: int) -> list[tuple[int, int]]:
    """Each of the student's blocks with the one of the teacher's that ends the same share of it."""
    return [(i, -(-(i + 1) * teachers // students) - 1) for i in range(students)]


def _projection(ours: int, theirs: int, generator: torch.Generator) -> nn.Module:
    """From the student's width to the teacher's; nothing where they are the same."""
    if ours == theirs:
        return nn.Identity()
    projection = nn.Linear(ours, theirs, bias=False)
    nn.init.orthogonal_(projection.weight, generator=generator)
    return projection
