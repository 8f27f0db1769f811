"""Orthogonal matrices that spread what is in one channel over all, as products that are fast to apply.

A randomized Hadamard matrix (QuIP#, arXiv 2402.04396, sec. 3) is a diagonal of random signs times a Hadamard matrix
over sqrt(n). For n = 2^k m those are Kronecker products of Sylvester's matrices and one of Paley's of order 4 m,
8 m, ...; where there is none, of a random orthogonal matrix of order m.

Shapes: N rows, I columns, a multiple of n.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_PALEY = 256


@dataclass(frozen=True)
class Orthogonal:
    """R = diag(signs) (F_1 x F_2 x ...), an n x n matrix; all in float64."""

    signs: Tensor
    factors: tuple[Tensor, ...]

    def apply(self, x_NI: Tensor) -> Tensor:
        """x R for each n columns of x, float64 [N, I]."""
        x = x_NI.double().reshape(-1, len(self.signs)) * self.signs
        for factor in self.factors:  # the first axis of the product goes last; in the end they stand as they did
            x = (x.unflatten(1, (len(factor), -1)).transpose(1, 2) @ factor).flatten(1)
        return x.view(x_NI.shape)


def hadamard(n: int, seed: int) -> Orthogonal:
    """A randomized Hadamard matrix of order n."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1
    twos = (n & -n).bit_length() - 1
    odd = n >> twos
    factors: list[Tensor] = []
    if odd > 1:
        orders = [(shift, paley(odd << shift)) for shift in range(2, twos + 1) if odd << shift <= LARGEST_PALEY]
        shift, base = next(((s, h) for s, h in orders if h is not None), (0, None))
        factors.append(_random_orthogonal(odd, generator) if base is None else base / len(base) ** 0.5)
        twos -= shift
    factors = [*(_sylvester(part) for part in (twos // 2, twos - twos // 2) if part), *factors]
    return Orthogonal(signs, tuple(factors))


def random_orthogonal(n: int, seed: int) -> Orthogonal:
    """A random orthogonal matrix of order n, all of them equally likely."""
    generator = torch.Generator().manual_seed(seed)
    return Orthogonal(torch.ones(n, dtype=torch.float64), (_random_orthogonal(n, generator),))


def paley(order: int) -> Tensor | None:
    """Paley's matrix of that order: entries 1 and -1, rows orthogonal, float64. None where he has none from a prime."""
    if order % 4:
        return None
    if _is_prime(q := order - 1):  # q = 3 mod 4
        core = _conference(q, -1.0)
        return core + torch.eye(order, dtype=torch.float64)
    if _is_prime(q := order // 2 - 1) and q % 4 == 1:
        core, one = _conference(q, 1.0), torch.eye(order // 2, dtype=torch.float64)
        sides = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        middle = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(core, sides) + torch.kron(one, middle)
    return None


def _conference(q: int, sign: float) -> Tensor:
    """0 on the diagonal, ones in the first row, `sign` in the first column, and whether i - j is a square mod q."""
    squares = {i * i % q for i in range(1, q)}
    residue = torch.tensor([0.0, *(1.0 if i in squares else -1.0 for i in range(1, q))], dtype=torch.float64)
    difference = (torch.arange(q)[:, None] - torch.arange(q)) % q
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0], matrix[1:, 1:] = 1.0, sign, residue[difference]
    return matrix


def _sylvester(twos: int) -> Tensor:
    """The Hadamard matrix of order 2^twos over its norm."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(twos):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) * 0.5**0.5
    return matrix


def _random_orthogonal(n: int, generator: torch.Generator) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()  # without that not all are equally likely


def _is_prime(n: int) -> bool:
    return n > 2 and all(n % d for d in range(2, int(n**0.5) + 1))
