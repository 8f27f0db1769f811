"""Rounding the inputs of a block's linears while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from qtool.numerics.activations import fake_quantize
from qtool.scheme import ActivationScheme


@contextmanager
def round_inputs(block: nn.Module, roundings: Mapping[str, tuple[ActivationScheme, Tensor | None]]) -> Iterator[None]:
    """While active, the input of each submodule named in `roundings`, relative to the block, is rounded.

    Each has its scheme and its fixed scale [1], see `fake_quantize`. An input that several of them read one after
    the other, as q, k and v do, is rounded once.
    """
    before: tuple[object, ...] = ()
    latest: tuple[Tensor, Tensor] | None = None  # as it came and rounded

    def rounding(scheme: ActivationScheme, scale: Tensor | None) -> Callable[[nn.Module, tuple[Tensor, ...]], object]:
        how = scheme, None if scale is None else scale.item()

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            nonlocal before, latest
            x = args[0]
            now = (*how, x._version)  # which counts the changes in place
            if latest is None or latest[0] is not x or before != now:
                before, latest = now, (x, fake_quantize(x, scheme, scale))
            return (latest[1], *args[1:])

        return hook

    handles = [block.get_submodule(name).register_forward_pre_hook(rounding(*how)) for name, how in roundings.items()]
    try:
        yield
    finally:
        latest = None
        for handle in handles:
            handle.remove()
