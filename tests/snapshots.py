"""Snapshots of a small linear-in-parameters network trained by gradient descent, built without torch.

N samples in C classes, f = Jθ with a Jacobian J that drifts between probes. K = J Jᵀ, M = Sᵀ K S, S Sᵀ = Hessian of the
loss in the outputs, coordinates = Vᵀ S⁺ g with M = V diag(rates) Vᵀ and g the gradient of the loss in the outputs.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ntk_monitor.snapshot import Floats, Snapshot

Array = NDArray[np.float64]
EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True, slots=True)
class _Loss:
    """Value, gradient in the outputs (n,), factor S (n, n) and weighted residual S⁺g (n,) of one loss."""

    value: float
    gradient: Array
    root: Array
    residual: Array


def _cross_entropy(outputs: Array, labels: NDArray[np.int64]) -> _Loss:
    n, c = outputs.shape
    shifted = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    p = shifted / shifted.sum(axis=1, keepdims=True)
    error = p - np.eye(c)[labels]
    root = np.zeros((n * c, n * c))
    for i in range(n):
        block = slice(i * c, (i + 1) * c)
        root[block, block] = (np.diag(np.sqrt(p[i])) - np.outer(p[i], np.sqrt(p[i]))) / np.sqrt(n)
    value = float(-np.log(p[np.arange(n), labels]).mean())
    return _Loss(value, error.ravel() / n, root, (error / np.sqrt(p)).ravel() / np.sqrt(n))


def _squared(outputs: Array, labels: NDArray[np.int64]) -> _Loss:
    n, c = outputs.shape
    error = (outputs - (np.eye(c)[labels] if c > 1 else labels[:, None] - 0.5)).ravel()
    scale = 2 / (n * c)
    return _Loss(float((error**2).mean()), scale * error, np.sqrt(scale) * np.eye(n * c), np.sqrt(scale) * error)


def _jacobian(labels: NDArray[np.int64], outputs: int, generator: np.random.Generator) -> Array:
    """Return (N, C, P): class centres plus noise with a power-law spectrum, a bias, one head per output."""
    width = 3 * labels.size * outputs
    scale = 1 / (1 + np.arange(width)) ** 0.8
    centres = generator.normal(size=(int(labels.max()) + 1, width)) * scale
    features = centres[labels] + 0.7 * generator.normal(size=(labels.size, width)) * scale
    features[:, 0] += 1.0
    sizes = np.diag(1 + 0.3 * generator.random(outputs))
    heads = np.einsum("nf,cd->ncfd", features, sizes).reshape(labels.size, outputs, -1)
    return np.asarray(heads, dtype=np.float64)


def _metrics(kernel: Array, eigenvalues: Floats, floor: float, step: int) -> dict[str, float]:
    kept = eigenvalues[eigenvalues > floor]
    share = kept / kept.sum()
    return {
        "trace": float(np.trace(kernel)),
        "condition_log10": float(np.log10(kept[0] / kept[-1])),
        "effective_rank": float(np.exp(-(share * np.log(share)).sum())),
        "alignment": float(np.tanh(0.2 + step / 400)),
        "overhead": 0.02 * (1 + float(np.exp(-step / 100))),
    }


def training(
    samples: int = 12, outputs: int = 3, probes: int = 6, *, loss: str = "cross_entropy", every: int = 40, seed: int = 0
) -> list[Snapshot]:
    """Return one measured snapshot per probe of a short gradient-descent run, `every` steps apart from step 0.

    One output is regression: its loss is squared error whatever `loss` says.
    """
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, max(outputs, 2), size=samples)
    jacobian, drift = (_jacobian(labels, outputs, generator) for _ in range(2))
    f = 0.1 * generator.normal(size=(samples, outputs))
    loss = loss if outputs > 1 else "mse"
    evaluate = _cross_entropy if loss == "cross_entropy" else _squared
    order = np.argsort(labels, kind="stable")
    history: list[Snapshot] = []
    basis: Array | None = None
    before: Array | None = None
    for k in range(probes):
        step = k * every
        rows = (jacobian * (1 + 0.02 * k) + 0.05 * k * drift).reshape(samples * outputs, -1)
        kernel = rows @ rows.T
        current = evaluate(f, labels)
        values = np.linalg.eigvalsh(kernel)[::-1].copy()
        rates, vectors = np.linalg.eigh(current.root.T @ kernel @ current.root)
        rates, vectors = rates[::-1].copy(), vectors[:, ::-1]
        floor = kernel.shape[0] * EPS * float(values[0])
        rank = int((values > floor).sum())
        metrics = _metrics(kernel, values, floor, step)
        if before is not None:
            metrics["kernel_change"] = float(
                1 - (kernel * before).sum() / np.linalg.norm(kernel) / np.linalg.norm(before)
            )
        blocks = kernel.reshape(samples, outputs, samples, outputs)
        history.append(
            Snapshot(
                step=step,
                wall_time=1.7e9 + step,
                epoch=step // 100,
                kernel="full",
                engine="rows",
                engine_reason="few outputs: one backward pass for each is the shortest exact route",
                precision="float32 Jacobian, float64 Gram",
                samples=samples,
                outputs=outputs,
                parameters=rows.shape[1],
                probe="c0ffee",
                probe_source="first samples of the training set",
                noise_floor=floor,
                rank=rank,
                condition_number=float(values[0] / values[rank - 1]),
                condition_is_lower_bound=rank < values.size,
                loss=f"{loss}(mean)",
                loss_status="matched",
                loss_value=current.value,
                rates_floor=rates.size * EPS * float(rates[0]),
                previous_step=None if basis is None else step - every,
                metrics=metrics,
                facts={"lr": 0.3 / float(rates[0]), "total_steps": float(every * probes), "batch_size": float(samples)},
                texts={"optimizer": "SGD"},
                layers=("body", "head"),
                directions=tuple(f"class {label}" for label in range(2)),
                time_to_learn=np.where(
                    rates > 0.01 * rates[0], 7.0 * rates[0] / np.maximum(rates, 1e-3 * rates[0]), np.inf
                ),
                forecast_steps=np.array([step, step + every], dtype=np.int64),
                forecast_loss=np.array([current.value, 0.8 * current.value]),
                layer_trace=np.array([0.6, 0.4]) * float(np.trace(kernel)),
                layer_share=np.array([0.7, 0.3]),
                layer_update=np.array([0.8, 0.2]),
                layer_useful=np.array([0.5, 0.1]),
                layer_moved=np.array([0.01, 0.02]) * k,
                layer_norm=np.array([3.0, 4.0]),
                direction_residual=np.array([0.2, 0.3]),
                direction_rate=np.array([0.5, 0.6]) * float(rates[0]),
                direction_eta=np.array([30.0, np.inf]),
                interference=np.array([[1.0, -0.1], [-0.1, 2.0]]),
                seconds={"jacobian": 0.05, "gram": 0.01, "spectrum": 0.02},
                eigenvalues=values,
                rates=rates,
                coordinates=vectors.T @ current.residual,
                carried=np.empty(0) if basis is None else basis.T @ current.residual,
                predictions=f.copy(),
                labels=labels.astype(np.float64),
                gram=np.einsum("ncmc->nm", blocks)[np.ix_(order, order)] / outputs,
            )
        )
        basis, before = vectors, kernel
        # Below 1 / rate, so that even a single mode never reaches a residual of exactly zero.
        lr = 0.3 / float(rates[0])
        for _ in range(every):
            f = f - lr * (kernel @ evaluate(f, labels).gradient).reshape(f.shape)
    return history


def snapshot(samples: int = 12, outputs: int = 3, *, loss: str = "cross_entropy", seed: int = 0) -> Snapshot:
    """Return the first probe of a run."""
    return training(samples, outputs, probes=1, loss=loss, seed=seed)[0]


def without_modes(measured: Snapshot, reason: str = "not verified: no known loss gives 2.31 on this batch") -> Snapshot:
    """Return the same probe as it is when the loss could not be identified: spectrum yes, modes no."""
    return replace(
        measured,
        loss="",
        loss_status=reason,
        loss_value=float("nan"),
        modes_reason=reason,
        rates_floor=float("nan"),
        previous_step=None,
        rates=np.empty(0),
        coordinates=np.empty(0),
        carried=np.empty(0),
    )


def skipped(step: int = 0, reason: str = "not enough free memory for the Jacobian") -> Snapshot:
    """Return a probe that was not taken."""
    return Snapshot(step=step, wall_time=1.7e9 + step, status="skipped", reason=reason)


def broken(measured: Snapshot) -> Snapshot:
    """Return the same probe with every number NaN, which a reader must survive even if no writer produces it."""

    def nan(values: Floats) -> Floats:
        return np.full(values.shape, np.nan)

    return replace(
        measured,
        noise_floor=float("nan"),
        condition_number=float("nan"),
        loss_value=float("nan"),
        rates_floor=float("nan"),
        metrics=dict.fromkeys(measured.metrics, float("nan")),
        eigenvalues=nan(measured.eigenvalues),
        rates=nan(measured.rates),
        coordinates=nan(measured.coordinates),
        carried=nan(measured.carried),
        gram=nan(measured.gram),
    )
