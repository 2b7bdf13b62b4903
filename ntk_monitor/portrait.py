"""Portrait: what a record shows of the samples themselves.

At every probe: what is left of the residual at each sample, and which samples the leading modes are about. Once in a
process: the samples as pictures or texts, where they are some.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntk_monitor.errors import said
from ntk_monitor.look import Measurement, Outlook, Place
from ntk_monitor.losses import Terms
from ntk_monitor.modes import Modes
from ntk_monitor.patterns import LEADING, leading, patterns, sample_residual
from ntk_monitor.probe import Probe
from ntk_monitor.thumbnails import thumbnails

Array = NDArray[Any]

# Patterns of more numbers than this stay out of the record: 256 kB at each probe.
_KEPT = 2**16


class Portrait:
    """Shows the samples of one probe.

    Attributes:
        texts: what each sample says, one line each; empty: unknown.
    """

    def __init__(self, probe: Probe, *, strict: bool = False) -> None:
        self._probe, self._strict, self._shown = probe, strict, False
        self.texts: tuple[str, ...] = ()

    def show(
        self, found: Outlook, raw: Measurement, terms: Terms | None, modes: Modes | None, place: Place | None = None
    ) -> None:
        """Fill in what concerns the samples. What fails leaves a sentence in `texts` and takes nothing else along.

        Args:
            found: gets the arrays and the texts.
            raw: the measurement.
            terms: of the loss there; None: unknown.
            modes: of M; None: those of K are solved for, up to 16.
            place: in a series that is measured afterwards, whose first record shows the samples.
        """
        try:
            found.arrays |= self._arrays(raw, terms, modes)
            first = not self._shown if place is None else place.index == 0
            if first:
                self._shown = True
                found.arrays["thumbnails"] = thumbnails(self._probe.inputs)
                found.sample_texts = self.texts if len(self.texts) == self._probe.samples else ()
        except Exception as error:
            if self._strict:
                raise
            found.texts["samples"] = f"not shown: {said(error)}"

    def _arrays(self, raw: Measurement, terms: Terms | None, modes: Modes | None) -> dict[str, Array]:
        samples = self._probe.samples
        found: dict[str, Array] = {}
        if terms is not None:
            found["sample_residual"] = sample_residual(terms.residual(), samples)
        if min(LEADING, len(raw.values)) * max(samples, len(raw.values) // samples) > _KEPT:
            return found
        if modes is not None:
            u, w = patterns(modes.vectors[:, :LEADING], samples, modes.coordinates)
        else:
            u, w = patterns(leading(raw.values), samples)
        return found | {"mode_samples": np.asarray(u), "mode_outputs": np.asarray(w)}
