"""Gradients that wait for those of other outputs, so that a layer without positions takes few long products."""

from dataclasses import replace

from torch import Tensor

from ntk_monitor.engines.structured.contraction import INNER, Factors
from ntk_monitor.engines.structured.units import Unit


class Waiting:
    """Gradients of a layer with one position per sample, side by side for as many outputs as one product takes.

    They are copies, so that nothing else of a backward pass stays in memory.
    """

    def __init__(self, unit: Unit, left: Factors, right: Factors | None, outputs: int) -> None:
        self.unit = unit
        self.held = 0
        self._first = 0
        self._room = min(outputs, INNER // left.channels)
        self._factors = [f for f in (left, right) if f is not None]
        self._gradients = [f.inputs().new_empty(f.sizes[0], self._room, 1, f.channels) for f in self._factors]

    @property
    def full(self) -> bool:
        """True when what is held has to be taken before more comes."""
        return self.held == self._room

    def hold(self, left: Factors, right: Factors | None, c: int) -> None:
        """Copy the gradients of output c, the next one."""
        self._first = c if not self.held else self._first
        for kept, factors in zip(self._gradients, [left, right], strict=False):
            assert factors is not None
            kept[:, self.held : self.held + 1] = factors.gradient()
        self.held += 1

    def taken(self) -> tuple[Factors, Factors | None, slice]:
        """Return both sides with the gradients of the outputs held, and which those are; right is None where it was."""
        left, *right = map(_with_gradients, self._factors, [g[:, : self.held] for g in self._gradients])
        outputs = slice(self._first, self._first + self.held)
        self.held = 0
        return left, right[0] if right else None, outputs


def _with_gradients(factors: Factors, g: Tensor) -> Factors:
    return replace(factors, classes=g.shape[1], gradient=lambda: g)
