"""The losses of training, per predicted token, in nats.

Divergences compare the teacher's distribution p = softmax(z_t / T) with the student's q = softmax(z_s / T); times T^2
their gradients keep their size over T (Hinton, arXiv 1503.02531, sec. 2). Of the teacher's K most likely tokens each
is a category and all others together are one more, so that what is known of p is compared and nothing else. Logits
must be finite.

Shapes: N tokens, S tokens of a slice, V vocabulary, K tokens kept, C categories, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qtool.errors import unknown

SLICE_LOGITS = {"cpu": 1 << 24}  # logits computed at once, by kind of device; speed and memory only
OTHER_SLICE = 1 << 27
KEPT_SLICES = 2  # of which the gradient may keep what it needs, instead of computing them again; likewise


@dataclass(frozen=True)
class TopK:
    """What is known of distributions at temperature T: log p of the K most likely tokens, and of all others together.

    With K = V there are no others: their log p is -inf.
    """

    ids_SK: Tensor  # int64
    log_p_SK: Tensor
    log_tail_S: Tensor
    vocabulary: int  # V


def top_k(logits_SV: Tensor, k: int, temperature: float) -> TopK:
    """The K largest of softmax(z / T), largest first."""
    log_p_SV = log_softmax(logits_SV, temperature)
    log_p_SK, ids_SK = log_p_SV.topk(min(k, log_p_SV.shape[1]), dim=1)
    return TopK(ids_SK, log_p_SK, _log_rest(log_p_SV, ids_SK), log_p_SV.shape[1])


def divergence(kind: str, student_SV: Tensor, teacher: Tensor | TopK, temperature: float = 1.0) -> Tensor:
    """D(teacher, student) at a temperature [S], without the factor T^2.

    `teacher` is logits [S, V'], or the top of the distribution at that same temperature. Where one of two
    vocabularies is longer, for rows of padding in its embedding, the tokens that both have are compared; a top of the
    longer one must be made of these.
    """
    if isinstance(teacher, TopK):
        log_q_SV = log_softmax(student_SV[:, : teacher.vocabulary], temperature)
        log_p_SC, log_q_SC = teacher.log_p_SK, log_q_SV.gather(1, teacher.ids_SK)
        if log_p_SC.shape[1] < teacher.vocabulary:
            log_p_SC = torch.cat([log_p_SC, teacher.log_tail_S[:, None]], 1)
            log_q_SC = torch.cat([log_q_SC, _log_rest(log_q_SV, teacher.ids_SK)[:, None]], 1)
    else:
        shared = min(student_SV.shape[1], teacher.shape[1])
        log_q_SC = log_softmax(student_SV[:, :shared], temperature)
        log_p_SC = log_softmax(teacher[:, :shared], temperature)
    if kind == "kl":
        return _kl(log_p_SC, log_q_SC)
    if kind == "reverse-kl":
        return _kl(log_q_SC, log_p_SC)
    if kind == "jsd":
        log_m_SC = torch.logaddexp(log_p_SC, log_q_SC) - log(2)
        return (_kl(log_p_SC, log_m_SC) + _kl(log_q_SC, log_m_SC)) / 2
    raise unknown("divergence", kind, ("kl", "reverse-kl", "jsd"))


def cross_entropy(student_SV: Tensor, true_S: Tensor) -> Tensor:
    """-log q of the true tokens [S], at T = 1."""
    return torch.nn.functional.cross_entropy(student_SV.float(), true_S, reduction="none")


def state_error(student_NE: Tensor, teacher_NE: Tensor) -> Tensor:
    """The mean squared error of each state [N], relative to the mean square of the teacher's.

    Relative because states of later blocks, and of the first token, are larger by orders of magnitude.
    """
    student_NE, teacher_NE = student_NE.float(), teacher_NE.float()
    error_N, size_N = ((x * x).mean(-1) for x in (student_NE - teacher_NE, teacher_NE))
    return error_N / size_N.clamp(min=torch.finfo(torch.float32).eps)


def slice_tokens(device: torch.device, vocabulary: int) -> int:
    """Of how many tokens logits are computed at once."""
    return max(1, SLICE_LOGITS.get(device.type, OTHER_SLICE) // vocabulary)


def summed_by_slices(loss: Callable[[slice], Tensor], tokens: int, step: int) -> Tensor:
    """The sum of `loss(part)` [S] over slices of `step` tokens, with the logits of only a few slices in memory.

    For the gradient the others are computed again, so `loss` must be a function of what it closes over.
    """

    def total(part: slice) -> Tensor:
        return loss(part).sum()

    parts = [slice(start, min(start + step, tokens)) for start in range(0, max(1, tokens), step)]
    sums = [total(part) for part in parts[:KEPT_SLICES]]
    sums += [checkpoint(total, part, use_reentrant=False, preserve_rng_state=False) for part in parts[KEPT_SLICES:]]
    return torch.stack(sums).sum()


def log_softmax(logits_SV: Tensor, temperature: float) -> Tensor:
    """log softmax(z / T), float32."""
    values_SV = logits_SV.float()
    return (values_SV if temperature == 1 else values_SV / temperature).log_softmax(-1)


def _kl(log_a_SC: Tensor, log_b_SC: Tensor) -> Tensor:
    """KL(a || b) [S]."""
    return (log_a_SC.exp() * (log_a_SC - log_b_SC)).sum(-1)


def _log_rest(log_p_SV: Tensor, ids_SK: Tensor) -> Tensor:
    """log of the sum of all probabilities but those of K tokens [S]; summed, for one minus the rest is rounding."""
    return log_p_SV.scatter(1, ids_SK, -torch.inf).logsumexp(1)
