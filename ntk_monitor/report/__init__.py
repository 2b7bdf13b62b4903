"""One self-contained HTML file from the history of a run, or of several: words first, then every figure that has data.

Opens from disk without a network: plotly.js of the installed plotly package is written into the file (4.8 MB).
"""

from ntk_monitor.panels import GROUPS as GROUPS
from ntk_monitor.report.document import page as page
from ntk_monitor.report.document import write as write
from ntk_monitor.report.panels import Panel as Panel
from ntk_monitor.report.panels import panels as panels

__all__ = ["GROUPS", "Panel", "page", "panels", "write"]
