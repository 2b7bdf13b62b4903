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
        "lr_headroom_low",
        "factor",
        "the learning rate could be multiplied by this before noise of batches of this size makes steps unstable",
        "a bound for the present weights and a quadratic loss; needs about ten steps of Adam before it means anything",
    ),
    Scalar(
        "lr_headroom_high",
        "factor",
        "the same for full-batch steps; between the two lies the factor at which this run would break",
        "cross-entropy and training at the edge of stability can survive values somewhat below 1",
    ),
    Scalar(
        "sharpness",
        "learning rate x curvature",
        "largest eigenvalue of the loss-weighted training operator, preconditioned, times the learning rates in force",
        "a small probe over-estimates it, 24 % at 64 samples; the jackknife bias is recorded beside it",
    ),
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
        "linearisation_error",
        "fraction of the outputs' motion",
        "how much of the change of the outputs since the previous probe the tangent at that probe did not see",
        "means nothing when the outputs hardly moved; then it is left out",
    ),
    Scalar(
        "residual_out_of_reach",
        "fraction of the residual",
        "energy of the residual in modes that the remaining steps will not learn, by simulation",
        "needs the planned number of steps; the kernel will move, and modes may come into reach",
    ),
    Scalar(
        "noise_scale",
        "samples",
        "gradient-noise scale: batches well below it give noisy steps, well above it add little per sample",
        "not resolved when the gradient drowns in its noise on the probe; then it is left out",
    ),
    Scalar(
        "overhead",
        "fraction of wall time",
        "time spent inside the monitor since the end of its start-up, divided by all time since then",
        "start-up (drawing the probe, matching the loss, the first complete probe) is told apart, in the record; high "
        "during the first steps after it, while early light probes are paid back",
    ),
)

NAMES: tuple[str, ...] = tuple(scalar.name for scalar in SCALARS)
