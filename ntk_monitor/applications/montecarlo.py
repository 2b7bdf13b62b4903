"""Monte Carlo over initialisations: statistics of the kernels of many draws of one network, in one process or several.

Median and quartiles, since the condition number is heavy-tailed and E[cond K] ≠ cond E[K].
"""

import copy
import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ntk_monitor.applications.initializers import Init
from ntk_monitor.batch import Batch, tensors
from ntk_monitor.errors import InputError, NumericsError
from ntk_monitor.guard import random_state
from ntk_monitor.kernel import Outputs, measured
from ntk_monitor.network import Forward
from ntk_monitor.spectrum import Spectrum

STATISTICS = ("trace", "condition_log10", "effective_rank", "lambda_max")
"""What is recorded of each draw, in this order."""

Array: TypeAlias = NDArray[np.float64]
Model: TypeAlias = nn.Module | Callable[[], nn.Module]
Progress: TypeAlias = Callable[[int, int], None]
"""Called with (draws done, draws in all) in the calling process."""

_Row: TypeAlias = tuple[float, ...]
_Jobs: TypeAlias = "Mapping[tuple[str, int], _Job]"


@dataclass(frozen=True, slots=True)
class Draws:
    """Statistics of the kernels of one initialisation.

    Attributes:
        values: statistic → (draws,); NaN where a kernel was zero or not finite.
        deficient: draws whose kernel has eigenvalues below its noise floor: their condition number is a lower bound.
    """

    values: Mapping[str, Array]
    deficient: int

    def quartiles(self, statistic: str) -> tuple[float, float, float]:
        """Return the first quartile, the median and the third over the finite draws."""
        low, middle, high = np.nanquantile(self.values[statistic], [0.25, 0.5, 0.75])
        return float(low), float(middle), float(high)

    def mean(self, statistic: str, sigmas: float = 1.96) -> tuple[float, float, float]:
        """Return the mean and its normal confidence interval, `sigmas` standard errors wide on each side."""
        kept = self.values[statistic][np.isfinite(self.values[statistic])]
        middle = float(kept.mean())
        wide = sigmas * float(kept.std(ddof=1)) / math.sqrt(kept.size) if kept.size > 1 else math.inf
        return middle, middle - wide, middle + wide


def median_interval(values: Array) -> tuple[float, float, float]:
    """Return the median and a distribution-free 95 % interval of it: order statistics of Binomial(n, ½).

    Below six values no such interval exists; the ends are then infinite.

    Source: Conover, "Practical Nonparametric Statistics", 1999.
    """
    ordered = np.sort(values[np.isfinite(values)])
    n = ordered.size
    if not n:
        return math.nan, -math.inf, math.inf
    tail, rank = 0.0, 0
    while rank < n // 2 and (tail := tail + math.comb(n, rank) / 2**n) <= 0.025:
        rank += 1
    low, high = (float(ordered[rank - 1]), float(ordered[n - rank])) if rank else (-math.inf, math.inf)
    return float(np.median(ordered)), low, high


@dataclass(frozen=True, slots=True)
class _Job:
    """What a worker needs; it is pickled once per piece of work."""

    model: Model
    x: Batch
    init: Init
    outputs: Outputs
    forward: Forward | None
    seeds: tuple[int, ...]

    def run(self) -> list[_Row]:
        torch.set_grad_enabled(True)
        factory = None if isinstance(self.model, nn.Module) else self.model
        with random_state():
            kept = copy.deepcopy(self.model) if isinstance(self.model, nn.Module) else self.model()
            found = []
            for seed in self.seeds:
                torch.manual_seed(seed)
                # The same live module throughout: a kernel's engine is checked once per module.
                if self.init is as_built and factory is not None:
                    kept.load_state_dict(factory().state_dict())
                else:
                    self.init(kept)
                found.append(self._statistics(kept))
        return found

    def _statistics(self, model: nn.Module) -> _Row:
        kernel = measured(model, self.x, outputs=self.outputs, forward=self.forward)
        try:
            return statistics(kernel.values, jacobian_eps=torch.finfo(kernel.jacobian_dtype).eps)
        except NumericsError:
            return (math.nan,) * (len(STATISTICS) + 1)


def as_built(module: nn.Module) -> None:
    """Stand for "whatever the factory draws"; only a factory can be drawn from anew."""
    raise InputError(f"only a factory can be drawn as built, got a {type(module).__name__}; pass a callable")


def statistics(kernel: Any, *, jacobian_eps: float = 0.0) -> _Row:
    """Return trace, log10 condition number, effective rank, λ₁ and the number of unresolved eigenvalues of a kernel.

    Args:
        kernel: (n, n) or (N, C, N, C).
        jacobian_eps: machine epsilon of the Jacobian behind it; see `Spectrum.of`.

    Cost: O(n³).
    """
    spectrum = Spectrum.of(kernel, vectors=False, jacobian_eps=jacobian_eps)
    condition = math.log10(spectrum.condition_number) if spectrum.rank else math.nan
    missing = len(spectrum.eigenvalues) - spectrum.rank
    return spectrum.trace, condition, spectrum.effective_rank, spectrum.lambda_max, float(missing)


def draws(  # noqa: PLR0913 - one experiment
    model: Model,
    x: Batch,
    inits: Mapping[str, Init],
    *,
    count: int,
    outputs: Outputs = "full",
    forward: Forward | None = None,
    seed: int = 0,
    processes: int = 1,
    progress: Progress | None = None,
) -> dict[str, Draws]:
    """Return the statistics of `count` kernels for each initialisation. Draw i uses the same seed under all of them.

    Args:
        model: a module (copied, never changed) or a callable that builds one.
        x: N samples.
        inits: name → function that draws a module's parameters in place.
        count: draws per initialisation.
        outputs: as in `empirical_ntk`.
        forward: as in `empirical_ntk`.
        seed: of the first draw.
        processes: above 1, spawned workers with one thread each; what they get must pickle, and a script must start
            them below `if __name__ == "__main__":`. The numbers do not depend on it.
        progress: called after every piece of work.

    Raises:
        InputError: no draws, no initialisations, or something that workers cannot be given.

    Cost: `count` kernels and eigendecompositions per initialisation.
    """
    if count < 1 or not inits:
        raise InputError(f"wanted at least one draw of one initialisation, got {count} of {len(inits)}")
    # Four pieces for every process: few enough to be cheap, many enough to end together and to show progress.
    pieces = math.ceil(count / (4 * max(processes, 1)))
    if processes == 1:
        # Every piece checks the engine on a copy of its own, which costs as much as a few draws.
        pieces = max(pieces, min(count, 8))
    jobs = {
        (name, start): _Job(
            model, x, init, outputs, forward, tuple(range(seed + start, seed + min(start + pieces, count)))
        )
        for name, init in inits.items()
        for start in range(0, count, pieces)
    }
    found: dict[tuple[str, int], list[_Row]] = {}
    done, total = 0, count * len(inits)
    for key, rows in _serial(jobs) if processes == 1 else _parallel(jobs, processes):
        found[key] = rows
        done += len(rows)
        if progress is not None:
            progress(done, total)
    return {name: _gathered([found[key] for key in jobs if key[0] == name]) for name in inits}


def _gathered(rows: list[list[_Row]]) -> Draws:
    table = np.array([row for piece in rows for row in piece], dtype=np.float64)
    return Draws({name: table[:, k] for k, name in enumerate(STATISTICS)}, int((table[:, -1] > 0).sum()))


def _serial(jobs: _Jobs) -> Iterator[tuple[tuple[str, int], list[_Row]]]:
    return ((key, job.run()) for key, job in jobs.items())


def _parallel(jobs: _Jobs, processes: int) -> Iterator[tuple[tuple[str, int], list[_Row]]]:
    first = next(iter(jobs.values()))
    on_gpu = any(t.device.type != "cpu" for t in tensors(first.x))
    if processes < 1 or on_gpu:
        raise InputError(f"worker processes compute on the CPU, got processes={processes}; move x there, or pass 1")
    try:
        for job in jobs.values():
            pickle.dumps(job)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise InputError(
            f"worker processes need models and initialisations that pickle, got: {error}; "
            "define them at the top level of a module, or pass processes=1"
        ) from error
    # Forked children of a process that has used torch's threads or CUDA can hang; spawned ones start clean.
    with ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        futures = {pool.submit(job.run): key for key, job in jobs.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
