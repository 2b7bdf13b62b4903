"""Numbers about a run: the twelve that are logged, and the registry of those that can be computed."""

from ntk_monitor.metrics.catalogue import NAMES as NAMES
from ntk_monitor.metrics.catalogue import SCALARS as SCALARS
from ntk_monitor.metrics.catalogue import Scalar as Scalar

__all__ = ["NAMES", "SCALARS", "Scalar"]
