"""Every figure once, as a plain plotly dict {"data": [...], "layout": {...}} that json.dumps accepts.

K = J Jᵀ is the unnormalised kernel of n rows, λ₁ ≥ … ≥ λₙ its eigenvalues; M is K weighted by the loss, and the
residual of the probe has one coordinate along each eigenvector (mode) of M. Skipped probes are left out. A value that
is not finite, or not positive on a logarithmic axis, becomes None: a gap. `layout["meta"]["tooltip"]` says in one
sentence what is drawn, for the page to show beside the title. A figure without data carries the reason in its middle.
"""

from ntk_monitor.figures.compared import layers_compared as layers_compared
from ntk_monitor.figures.compared import overlaps as overlaps
from ntk_monitor.figures.compared import spectra_compared as spectra_compared
from ntk_monitor.figures.decay import mode_decay as mode_decay
from ntk_monitor.figures.directions import named_residuals as named_residuals
from ntk_monitor.figures.drift import alignment as alignment
from ntk_monitor.figures.drift import kernel_drift as kernel_drift
from ntk_monitor.figures.forecast import forecast_error as forecast_error
from ntk_monitor.figures.forecast import loss_forecast as loss_forecast
from ntk_monitor.figures.gram import gram as gram
from ntk_monitor.figures.kernel_map import kernel_map as kernel_map
from ntk_monitor.figures.layers import layer_share as layer_share
from ntk_monitor.figures.layers import layer_updates as layer_updates
from ntk_monitor.figures.residual import residual_bands as residual_bands
from ntk_monitor.figures.residual import residual_reach as residual_reach
from ntk_monitor.figures.runs import runs_compared as runs_compared
from ntk_monitor.figures.samples import mode_samples as mode_samples
from ntk_monitor.figures.samples import sample_residual as sample_residual
from ntk_monitor.figures.samples import sample_row as sample_row
from ntk_monitor.figures.scalars import scalars as scalars
from ntk_monitor.figures.spectrum import spectra as spectra
from ntk_monitor.figures.spectrum import spectrum as spectrum
from ntk_monitor.figures.spectrum import spectrum_over_training as spectrum_over_training
from ntk_monitor.figures.stability import learning_rate_interval as learning_rate_interval
from ntk_monitor.figures.stability import learning_rate_intervals as learning_rate_intervals
from ntk_monitor.figures.stability import learning_rates as learning_rates
from ntk_monitor.figures.style import Figure as Figure
