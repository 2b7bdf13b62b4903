"""Two runs, or two probes of one run, side by side: the differences that matter, in words and figures.

Kernels of different probes are not comparable: their samples differ, and so do their entries, eigenvalues and
eigenvectors. `mismatch` says when that is so; then only what belongs to the run is compared: loss, learning rate,
layers, time to learn, cost.
"""

from ntk_monitor.compare.difference import Comparison as Comparison
from ntk_monitor.compare.difference import Difference as Difference
from ntk_monitor.compare.kernels import mismatch as mismatch
from ntk_monitor.compare.kernels import spectrum_distance as spectrum_distance
from ntk_monitor.compare.sides import probes as probes
from ntk_monitor.compare.sides import runs as runs
from ntk_monitor.compare.turn import Turn as Turn
from ntk_monitor.compare.turn import centred as centred
from ntk_monitor.compare.turn import turn as turn

__all__ = ["Comparison", "Difference", "Turn", "centred", "mismatch", "probes", "runs", "spectrum_distance", "turn"]
