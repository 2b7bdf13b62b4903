"""Numbers about a run: the twelve that are logged, and the registry of those that can be computed."""

from ntk_monitor.metrics import change as _change
from ntk_monitor.metrics import elsewhere as _elsewhere
from ntk_monitor.metrics import gradients as _gradients
from ntk_monitor.metrics import labels as _labels
from ntk_monitor.metrics import regression as _regression
from ntk_monitor.metrics import shares as _shares
from ntk_monitor.metrics import spectral as _spectral
from ntk_monitor.metrics import speed as _speed
from ntk_monitor.metrics.catalogue import NAMES as NAMES
from ntk_monitor.metrics.catalogue import SCALARS as SCALARS
from ntk_monitor.metrics.catalogue import Scalar as Scalar
from ntk_monitor.metrics.measured import Measured as Measured
from ntk_monitor.metrics.registry import METRICS as METRICS
from ntk_monitor.metrics.registry import Metric as Metric
from ntk_monitor.metrics.registry import evaluate as evaluate
from ntk_monitor.metrics.registry import metric as metric

# Importing these fills the registry.
_FILLED = (_spectral, _labels, _change, _gradients, _shares, _regression, _speed, _elsewhere)

__all__ = ["METRICS", "NAMES", "SCALARS", "Measured", "Metric", "Scalar", "evaluate", "metric"]
