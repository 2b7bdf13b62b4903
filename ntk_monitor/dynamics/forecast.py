"""ntk.forecast: what the next steps of this run, with its optimizer, loss and learning rates, will do, and how sure.

The outputs are simulated with the Jacobian as it is now. Whether that can be trusted is measured, not assumed: the
network is also run at the weights that the forecast leads to, and the kernel there makes a forecast of second order.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from ntk_monitor.batch import Batch
from ntk_monitor.dynamics.ahead import Scene, drifts
from ntk_monitor.dynamics.flow import Residual, residual_of
from ntk_monitor.dynamics.frozen import DENSE, frozen_path
from ntk_monitor.dynamics.linearise import FLOOR, linearise, natural_mode
from ntk_monitor.dynamics.model import Dynamics
from ntk_monitor.dynamics.objective import loss_gradient
from ntk_monitor.dynamics.simulate import Freeze, simulate
from ntk_monitor.dynamics.trust import Trust, judged, ratio_of
from ntk_monitor.errors import InputError
from ntk_monitor.kernel import measured
from ntk_monitor.network import Forward, Mode, Selection
from ntk_monitor.optimizers import OptimizerState, read
from ntk_monitor.shadow import unwrapped

Array = NDArray[np.float64]
Rates: TypeAlias = float | Sequence[float] | Callable[[int], float] | None


@dataclass(frozen=True, slots=True)
class Forecast:
    """The next T steps. N samples: those of the probe, or else of the training batch; C outputs."""

    outputs: Tensor
    """(T + 1, N, C...), before and after each step, float64."""
    loss: Array
    """(T + 1,), of the N samples."""
    mode_residuals: Array
    """(T + 1, N·C): components of the residual S⁺ dL/df on the modes of the start, fastest first."""
    speeds: Array
    """(N·C,): eigenvalues of these modes, of Sᵀ (Σ lr K) S: what a step of plain gradient descent takes off each."""
    rates: Tensor
    """(T, groups): the learning rates assumed."""
    trust: Trust

    def time_to(self, target: float) -> float:
        """Return the first step at which the loss is at or below the target; inf: not within these steps."""
        below = np.flatnonzero(self.loss <= target)
        return float(below[0]) if len(below) else math.inf


def forecast(  # noqa: PLR0913 - the public door
    model: nn.Module,
    optimizer: Any,
    batch: tuple[Batch, Any],
    loss: Any,
    steps: int = 100,
    lr: Rates = None,
    *,
    probe: tuple[Batch, Any] | None = None,
    params: Selection | None = None,
    forward: Forward | None = None,
    clip: float | None = None,
    mode: Mode | None = None,
    freeze: Freeze = "vhat",
    memory_limit: int | None = None,
    seed: int = 0,
) -> Forecast:
    """Return what the next steps will do to outputs, loss and modes, and whether to believe it.

    SGD, Adam and AdamW are simulated in function space. Any other optimizer, and Adam in its first ten steps, runs as
    it is, copied, on the linearised model. The model and the optimizer are only read.

    Args:
        model: the live module.
        optimizer: its optimizer, as it is now; several only of one kind.
        batch: (inputs, targets) that the loss averages over: all training data, or a sample that stands for it.
        loss: name, torch loss or callable (outputs, targets) → scalar.
        steps: how many.
        lr: None: as now. A number, or one for each step: of the first parameter group, the others in proportion. A
            callable step → multiplier of the rates now (0 is the next step), as `LambdaLR` takes it.
        probe: (inputs, targets) to forecast instead of the batch, driven by the batch through the cross kernel.
        params: which of the parameters that the optimizer updates take part; None: all of them.
        forward: see `empirical_ntk`.
        clip: norm that the gradient is clipped to; of minibatches it is larger than of the batch here.
        mode: "eval" or "train"; None: "train" where BatchNorm couples the samples of a batch.
        freeze: what of Adam's second moment stays: "vhat" for runs of minibatches, "v" where every step sees the whole
            batch (see `simulate`). `Trust.rule` says how much depends on it.
        memory_limit: bytes for blocks of a Jacobian.
        seed: of random numbers that a forward pass may draw.

    Raises:
        InputError: no steps, rates that do not fit, batches that do not fit, or an optimizer that cannot be copied.
        NetworkError: a module that cannot be followed.

    Cost: two kernels (under Adam with clipping three), T products with it, an eigendecomposition of N·C rows; under
    Adam, where J is small, T Adam steps on P parameters too.
    """
    if steps < 1:
        raise InputError(f"wanted at least one step, got {steps}")
    state = read(model, optimizer)
    scene = Scene(model, batch, None if probe is None else probe[0], params, forward, mode or natural_mode(model), seed)
    rates = _rates(state, lr, steps)
    job = _Job(scene, state, optimizer, loss, rates, clip, memory_limit)
    path, trust, dynamics = job.rule() if state.reason else job.function_space(freeze)
    shown = slice(0, scene.driven) if probe is None else slice(scene.driven, None)
    residual = _residual(path[0], shown, loss, batch[1] if probe is None else probe[1])
    speeds, basis = job.modes(residual, None if probe is not None else dynamics, path[0])
    return Forecast(
        outputs=path[:, shown],
        loss=np.array([residual.loss(f) for f in path]),
        mode_residuals=np.stack([basis.T @ residual.of(f) for f in path]),
        speeds=speeds,
        rates=rates,
        trust=trust,
    )


@dataclass(frozen=True, slots=True)
class _Job:
    """One forecast and the measurements around it."""

    scene: Scene
    state: OptimizerState
    optimizer: Any
    loss: Any
    rates: Tensor
    clip: float | None
    memory_limit: int | None

    def dynamics(self, module: nn.Module) -> Dynamics:
        """Return the linear model of the run at the weights of this module."""
        s = self.scene
        return linearise(
            module,
            self.state,
            s.driving,
            self.loss,
            riding=s.riding,
            params=s.params,
            forward=s.forward,
            mode=s.mode,
            clipping=self.clip is not None,
            memory_limit=self.memory_limit,
            seed=s.seed,
        )

    def function_space(self, freeze: Freeze) -> tuple[Tensor, Trust, Dynamics]:
        """Return the path of a known rule."""
        scene, state = self.scene, self.state
        now = self.dynamics(scene.module)
        path = simulate(now, self.rates, clip=self.clip, freeze=freeze)
        ratio = ratio_of(now, self.rates, state)
        if not bool(torch.isfinite(path).all()):
            return path, judged(path, ratio=ratio), now
        scale = state.preconditioner(dict(unwrapped(scene.module).named_parameters()), floor=FLOOR)
        change = scene.displacement(state, drifts(now, self.rates, clip=self.clip, freeze=freeze), scale)
        there = scene.moved(change)
        mean = now.average(self.dynamics(there))
        second = simulate(mean, self.rates, clip=self.clip, freeze=freeze)
        opinion = self._opinion(now, freeze) if state.family == "adam" else None
        trust = judged(path, ratio=ratio, there=scene.outputs(there), second=second[-1], rule=opinion)
        return path, trust, now

    def rule(self) -> tuple[Tensor, Trust, None]:
        """Return the path of the real optimizer on the linear model."""
        single = self._single()
        if single is None:
            raise InputError(f"{self.state.reason}; forecast the parameters of one optimizer at a time")
        path, change = frozen_path(self.scene, single, self.loss, self.rates, clip=self.clip)
        if not bool(torch.isfinite(path).all()):
            return path, judged(path, optimizer=self.state.reason), None
        there = self.scene.outputs(self.scene.moved(change))
        return path, judged(path, there=there, optimizer=self.state.reason), None

    def modes(self, residual: Residual, dynamics: Dynamics | None, outputs: Tensor) -> tuple[Array, Array]:
        """Return speeds and modes (n·C, n·C) of the samples shown, fastest first."""
        f = outputs[residual.samples]
        root = residual.objective.root(f)
        kernel = self._kernel() if dynamics is None else dynamics.speed(self.rates[0])
        if root.dim() == 3:
            root = torch.block_diag(*root)
        values, vectors = torch.linalg.eigh(root.T @ kernel @ root)
        return np.asarray(values.flip(0).numpy()), np.asarray(vectors.flip(1).numpy())

    def _kernel(self) -> Tensor:
        """Return Σ lr J D Jᵀ of the probe, or lr J Jᵀ of the batch for rules without a preconditioner."""
        s, state = self.scene, self.state
        live = dict(unwrapped(s.module).named_parameters())
        scale = state.preconditioner(live, floor=FLOOR) if not state.reason else None
        owner = {name: str(i) for i, group in enumerate(state.groups) for name in group.names}
        found = measured(
            s.module,
            s.driving[0] if s.riding is None else s.riding,
            params=[name for name in owner if name in live],
            forward=s.forward,
            mode=s.mode,
            preconditioner=scale,
            memory_limit=self.memory_limit,
            seed=s.seed,
            group=owner.__getitem__,
        )
        kernels = [float(self.rates[0, int(i)]) * k.cpu().double() for i, k in found.layers.items()]
        total = torch.stack(kernels).sum(0)
        return total.flatten(2).flatten(0, 1)

    def _opinion(self, now: Dynamics, freeze: Freeze) -> Tensor | None:
        """Return the last outputs when Adam's second moment moves after all.

        For full batches by the real rule on the linear model, where that is cheap; for minibatches, whose gradients
        the mean gradient knows nothing of, by the other thing that may stay.
        """
        if freeze == "vhat":
            return simulate(now, self.rates, clip=self.clip, freeze="v")[-1]
        single = self._single()
        parameters = sum(p.numel() for n, p in unwrapped(self.scene.module).named_parameters() if n in self.state.names)
        if single is None or now.outputs.numel() * parameters > DENSE:
            return None
        return frozen_path(self.scene, single, self.loss, self.rates, clip=self.clip)[0][-1]

    def _single(self) -> Optimizer | None:
        found = self.optimizer
        if isinstance(found, Sequence):
            found = found[0] if len(found) == 1 else None
        inner = getattr(found, "optimizer", None)
        return inner if isinstance(inner, Optimizer) else found


def _residual(outputs: Tensor, samples: slice, loss: Any, targets: Any) -> Residual:
    objective = loss_gradient(loss, targets)
    blank = Dynamics((), outputs[samples], len(outputs[samples]), objective, "other")
    found = residual_of(blank, loss, targets)
    return Residual(samples, found.objective, found.inverse)


def _rates(state: OptimizerState, lr: Rates, steps: int) -> Tensor:
    """Return the learning rates (steps, groups)."""
    now = torch.tensor([group.lr for group in state.groups], dtype=torch.float64)
    if lr is None:
        factors = torch.ones(steps, dtype=torch.float64)
    elif callable(lr):
        factors = torch.tensor([float(lr(t)) for t in range(steps)], dtype=torch.float64)
    else:
        wanted = torch.as_tensor(lr, dtype=torch.float64).reshape(-1)
        if len(wanted) not in (1, steps):
            raise InputError(f"wanted one learning rate or one for each of {steps} steps, got {len(wanted)}")
        if not now[0]:
            raise InputError(
                "the first parameter group has learning rate 0, so that no proportion exists; set it first"
            )
        factors = wanted.expand(steps) / now[0]
    return factors[:, None] * now
