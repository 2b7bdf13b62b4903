"""Which loss does this run minimise? Candidates are compared with the value the Trainer returned, batch by batch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ntk_monitor.losses import Loss

# A candidate that is right agrees to rounding (1e-6; 1e-3 in half precision). Near initialisation a wrong one can come
# close (label smoothing changes nothing while all classes are equally likely), so the winner must also stand out.
_TOLERANCE = 1e-3
_STANDS_OUT = 10.0
# One batch is no evidence: a penalty inside the loss can look like label smoothing by chance (7 to 12 % of runs).
_ENOUGH, _BATCHES = 3, 8


@dataclass(slots=True)
class Matching:
    """Collects evidence until one candidate agrees with the Trainer's loss and no other comes near, or gives up."""

    candidates: Sequence[Loss]
    batches: int = 0
    worst: list[float] = field(default_factory=list)
    rounding: float = math.inf
    last: str = ""

    def add(self, outputs: Tensor, targets: Tensor, value: float) -> None:
        """Compare every candidate with the value the Trainer returned for this batch."""
        self.batches += 1
        self.rounding = min(self.rounding, _rounding(value))  # one number with more digits shows that they are kept
        before = self.worst or [0.0] * len(self.candidates)
        self.worst = []
        for loss, earlier in zip(self.candidates, before, strict=True):
            error = abs(loss.value(outputs, targets) - value) / max(abs(value), 1e-12)
            self.worst.append(max(earlier, error if math.isfinite(error) else math.inf))
        error, name = min(
            ((e, loss.name) for e, loss in zip(self.worst, self.candidates, strict=True)), default=(1, "")
        )
        self.last = f"the closest, {name}, is off by {error:.1%}" if error < 1 else "none is close"

    @property
    def match(self) -> Loss | None:
        """The candidate that agrees on every batch so far and stands out from the rest, or None."""
        if self.batches < _ENOUGH or not self.worst:
            return None
        # By position, not by name: two losses attached to a module may differ in nothing but their class weights.
        (error, best), *rest = sorted((error, i) for i, error in enumerate(self.worst))
        if error > max(_TOLERANCE, self.rounding):
            return None
        rivals = [other for other, i in rest if self.candidates[i].kind != "other"]
        floor = max(error, self.rounding)
        return self.candidates[best] if all(other > _STANDS_OUT * floor for other in rivals) else None

    @property
    def over(self) -> bool:
        """True when a match was found, or when enough batches were compared to say there is none."""
        hopeless = bool(self.worst) and min(self.worst) > max(_TOLERANCE, self.rounding) and self.batches >= _ENOUGH
        return self.match is not None or hopeless or self.batches >= _BATCHES

    @property
    def status(self) -> str:
        """What to tell people, in a few words."""
        if self.match is not None:
            return "matched"
        if not self.batches:
            return "not verified: no training loss was seen"
        if self.batches < _ENOUGH:
            return f"not verified: it takes {_ENOUGH} batches, {self.batches} were seen; pass loss="
        if min(self.worst, default=math.inf) <= _TOLERANCE:
            return "not verified: several known losses give the Trainer's value; pass loss="
        return f"not verified: no known loss gives the Trainer's value ({self.last}); pass loss="


def _rounding(value: float) -> float:
    """Return the relative error that a loss may have from being stored: half precision if it is such a number."""
    for dtype in (torch.bfloat16, torch.float16):
        if float(torch.tensor(value, dtype=dtype)) == value:
            return torch.finfo(dtype).eps
    return 1e-7
