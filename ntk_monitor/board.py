"""What stock TensorBoard shows of a Snapshot: its scalars, a histogram of the spectrum, the Gram matrix.

And how it shows scalars that are read together: the two ends of the learning-rate interval in one chart.
"""

import re
from collections.abc import Iterator

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary

from ntk_monitor.figures import gram
from ntk_monitor.metrics import SCALARS
from ntk_monitor.render import png
from ntk_monitor.snapshot import Snapshot
from ntk_monitor.stock import histogram_value, image_value, layout_value, scalar_value

# Wider than 350 pixels, TensorBoard's image card gets a scroll bar.
_WIDTH, _HEIGHT = 350, 320


_CHARTS = {
    "the learning rate could be multiplied by": ("lr_headroom_low", "lr_headroom_high"),
    "alignment, and residual that the steps left do not reach": ("alignment", "residual_out_of_reach"),
    "how far the kernel moves, and what its tangent misses": ("kernel_change", "linearisation_error"),
}


def layout(prefix: str = "ntk") -> Summary.Value:
    """Return which scalars the custom-scalars dashboard draws in one chart; once per run."""
    charts = {title: [f"{re.escape(prefix)}/{name}$" for name in names] for title, names in _CHARTS.items()}
    return layout_value(f"tangent kernel ({prefix})", charts)


def scalars(snapshot: Snapshot, prefix: str = "ntk") -> Iterator[Summary.Value]:
    """Yield the scalars of a probe, each with its meaning and unit."""
    for scalar in SCALARS:
        if scalar.name in snapshot.metrics:
            yield scalar_value(
                f"{prefix}/{scalar.name}",
                snapshot.metrics[scalar.name],
                description=f"{scalar.meaning}; unit: {scalar.unit}",
            )


def pictures(snapshot: Snapshot, prefix: str = "ntk") -> Iterator[Summary.Value]:
    """Yield a histogram of log10 of the resolved eigenvalues and, where the snapshot holds one, the Gram image."""
    resolved = snapshot.eigenvalues[snapshot.eigenvalues > max(snapshot.noise_floor, 0.0)]
    if resolved.size:
        yield histogram_value(
            f"{prefix}/log10_eigenvalues",
            np.log10(resolved),
            description=f"log10 of the {resolved.size} eigenvalues above the noise floor, {snapshot.kernel} kernel, "
            "unnormalised K = J Jᵀ",
        )
    if snapshot.gram.size:
        picture = png(gram(snapshot, cosine=True), width=_WIDTH, height=_HEIGHT)
        yield image_value(
            f"{prefix}/gram",
            picture,
            _WIDTH,
            _HEIGHT,
            description="Cosine of the centred kernel (mean over outputs) between samples, sorted by class",
        )
