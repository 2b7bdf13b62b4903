"""Which loss does this run minimise? Candidates are compared with the value the Trainer returned, batch by batch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ntk_monitor.losses import Loss

# A candidate that is right agrees to rounding (1e-6; 1e-3 in half precision). Near initialisation a wrong one can come
# close (label smoothing changes nothing while all classes are equally likely), so the winner must also stand out.
_TOLERANCE = 1e-3
_STANDS_OUT = 10.0
_BATCHES = 8


@dataclass(slots=True)
class Matching:
    """Collects evidence until one candidate agrees with the Trainer's loss and no other comes near, or gives up."""

    candidates: Sequence[Loss]
    batches: int = 0
    worst: dict[str, float] = field(default_factory=dict)
    last: str = ""

    def add(self, outputs: Tensor, targets: Tensor, value: float) -> None:
        """Compare every candidate with the value the Trainer returned for this batch."""
        self.batches += 1
        errors = {}
        for loss in self.candidates:
            error = abs(loss.value(outputs, targets) - value) / max(abs(value), 1e-12)
            errors[loss.name] = max(self.worst.get(loss.name, 0.0), error if math.isfinite(error) else math.inf)
        self.worst = errors
        best = min(errors, key=errors.__getitem__, default="")
        self.last = f"the closest, {best}, is off by {errors[best]:.1%}" if best and errors[best] < 1 else "none is close"

    @property
    def match(self) -> Loss | None:
        """The candidate that agrees on every batch so far and stands out from the rest, or None."""
        if not self.worst:
            return None
        ranked = sorted(self.candidates, key=lambda loss: self.worst[loss.name])
        best = ranked[0]
        if self.worst[best.name] > _TOLERANCE:
            return None
        rivals = [self.worst[loss.name] for loss in ranked[1:] if loss.kind != "other"]
        floor = max(self.worst[best.name], 1e-7)
        return best if all(rival > _STANDS_OUT * floor for rival in rivals) else None

    @property
    def over(self) -> bool:
        """True when a match was found, or when enough batches were compared to say there is none."""
        hopeless = bool(self.worst) and min(self.worst.values()) > _TOLERANCE and self.batches >= 3
        return self.match is not None or hopeless or self.batches >= _BATCHES

    @property
    def status(self) -> str:
        """What to tell people, in a few words."""
        if self.match is not None:
            return "matched"
        if not self.batches:
            return "not verified: no training loss was seen"
        return f"not verified: no known loss gives the Trainer's value ({self.last}); pass loss="
