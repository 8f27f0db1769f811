"""Rounding the inputs of a block's linears while it runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from qtool.numerics.fake_quant import fake_quantize_inputs
from qtool.scheme import ActivationScheme


@contextmanager
def round_inputs(block: nn.Module, roundings: Mapping[str, tuple[ActivationScheme, Tensor | None]]) -> Iterator[None]:
    """While active, the input of each submodule named in `roundings`, relative to the block, is rounded.

    Each has its scheme and its fixed scale [1], see `fake_quantize`. An input that several of them read one after
    the other, as q, k and v do, is rounded once.
    """
    before: tuple[object, ...] = ()
    latest: tuple[weakref.ref[Tensor], Tensor] | None = None  # as it came, and rounded: kept for as long as that lives

    def forget(came: weakref.ref[Tensor]) -> None:
        nonlocal latest
        if latest is not None and latest[0] is came:
            latest = None

    def rounding(scheme: ActivationScheme, scale: Tensor | None) -> Callable[[nn.Module, tuple[Tensor, ...]], object]:
        how = scheme, None if scale is None else scale.item()

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            nonlocal before, latest
            x = args[0]
            now = (*how, x._version)  # which counts the changes in place
            rounded = latest[1] if latest is not None and latest[0]() is x and before == now else None
            if rounded is None:
                rounded = fake_quantize_inputs(x, scheme, scale)
                before, latest = now, (weakref.ref(x, forget), rounded)
            return (rounded, *args[1:])

        return hook

    handles = [block.get_submodule(name).register_forward_pre_hook(rounding(*how)) for name, how in roundings.items()]
    try:
        yield
    finally:
        latest = None
        for handle in handles:
            handle.remove()
