"""The scalars a run logs: name, unit, meaning and when each one lies. At most twelve, names fixed.

Only names listed in `SCALARS` are ever logged. A scalar that cannot be computed at a probe is left out, never faked.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scalar:
    """One logged number: what it is, in which unit, and when it misleads."""

    name: str
    unit: str
    meaning: str
    lies_when: str


SCALARS: tuple[Scalar, ...] = (
    Scalar(
        "trace",
        "squared output units",
        "sum of squared gradient norms of all probe outputs: how fast the outputs can move at a given learning rate",
        "one outlier sample can dominate it; it scales with network width and output scale",
    ),
    Scalar(
        "condition_log10",
        "decades",
        "log10 of largest over smallest resolved eigenvalue: how far apart the fastest and slowest modes are",
        "a lower bound whenever the kernel is rank-deficient or its smallest eigenvalues lie under the noise floor",
    ),
    Scalar(
        "effective_rank",
        "modes",
        "exp(entropy of the normalised eigenvalues), 1 to N·C: how many directions can be learned at a similar speed",
        "one dominant (constant) mode pulls it towards 1 although many directions are alive",
    ),
    Scalar(
        "alignment",
        "cosine, -1 to 1",
        "unbiased centred kernel-target alignment: how far samples that the kernel ties together share their targets",
        "noisy below about 100 probe samples; class imbalance shifts it",
    ),
    Scalar(
        "kernel_change",
        "1 - cosine, 0 to 1",
        "rotation of the kernel since the previous probe: 0 is a frozen (lazy) kernel",
        "blind to pure growth, which the trace shows; depends on the distance between probes",
    ),
    Scalar(
        "overhead",
        "fraction of wall time",
        "time spent inside the monitor since training started, divided by all time since then",
        "high during the first steps, before the cadence has settled",
    ),
)

NAMES: tuple[str, ...] = tuple(scalar.name for scalar in SCALARS)
