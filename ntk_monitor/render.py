"""A plotly dict becomes PNG bytes, drawn by matplotlib: no browser, no pyplot, no global state.

Covers what `ntk_monitor.figures` uses: scatter (lines, markers, stacked areas, areas between lines), stacked bars, heat
maps with a colour bar, linear, logarithmic and category axes placed by domain, lines and stripes, annotations, titles
and legends. Sizes are pixels, as in plotly. Anything else in the dict is ignored, never an error.
"""

import gc
import html
import io
import re
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas
    from matplotlib.legend import Legend

_DASHES: dict[str, Any] = {"solid": "-", "dot": (0, (1, 1.6)), "dash": (0, (5, 2.5)), "dashdot": "-."}
_VERTICAL = {"top": "upper", "middle": "center", "bottom": "lower"}
_RIGHT: dict[str, Any] = {"loc": "center right"}
_INK, _PALE_INK, _PALE = "#333333", "#666666", "#e6e6e6"
_SMALL = 500
"""Narrower than this (pixels), the legend goes below the plot and axes have fewer ticks."""


def _plain(text: str) -> str:
    """Return plotly's little HTML as text: line breaks kept, other tags dropped."""
    return html.unescape(re.sub(r"<[^>]*>", "", text.replace("<br>", "\n")))


def _shade(colour: Any) -> Any:
    """Return a colour as matplotlib reads it: "rgba(r, g, b, a)" becomes four fractions."""
    if not str(colour).startswith("rgba("):
        return colour
    red, green, blue, opacity = (float(part) for part in str(colour)[5:-1].split(","))
    return red / 255, green / 255, blue / 255, opacity


def _floats(values: Sequence[Any]) -> NDArray[np.float64]:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _title(spec: dict[str, Any]) -> str:
    title = spec.get("title", "")
    return _plain(title.get("text", "") if isinstance(title, dict) else title)


def _short(value: float) -> str:
    """Return a number as plotly labels it: 20k, 1.5M, 2e-05."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.6g}{letter}"
    return f"{value:.6g}"


def _edges(centres: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the n + 1 cell borders of n centres: midpoints, as plotly draws them."""
    if centres.size == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    half = np.diff(centres) / 2
    return np.concatenate([[centres[0] - half[0]], centres[:-1] + half, [centres[-1] + half[-1]]])


def _key(reference: str, letter: str) -> str:
    """Return the layout key of an axis reference: "x2" is described by "xaxis2"."""
    return f"{letter}axis{reference[1:]}"


class _Page:
    """One figure in the making: its size, its font scale and one matplotlib Axes per pair of plotly axes.

    `area` is what plotly calls paper: the rectangle inside the margins, in fractions of the canvas.
    """

    def __init__(self, spec: dict[str, Any], canvas: "Canvas") -> None:
        from matplotlib.transforms import Bbox, BboxTransformTo, TransformedBbox

        self.layout: dict[str, Any] = spec.get("layout", {})
        self.caption = ""
        self.canvas = canvas
        self.narrow = canvas.get_figwidth() * canvas.dpi < _SMALL
        self.point = 72 / canvas.dpi
        self.area = Bbox.from_bounds(0.1, 0.1, 0.8, 0.8)
        self.paper = BboxTransformTo(TransformedBbox(self.area, canvas.transFigure))
        self.axes: dict[tuple[str, str], Axes] = {}
        self.stacks: dict[tuple[str, ...], NDArray[np.float64]] = {}
        self.last: dict[tuple[str, str], NDArray[np.float64]] = {}

    def size(self, pixels: float) -> float:
        """Return pixels as points."""
        return pixels * self.point

    def at(self, item: dict[str, Any]) -> "Axes":
        """Return the Axes an item of the dict is drawn on, made on first use."""
        pair = (item.get("xaxis", "x"), item.get("yaxis", "y"))
        if pair not in self.axes:
            axes = self.canvas.add_axes((0.1, 0.1, 0.8, 0.8), label=str(pair))
            self.axes[pair] = axes
            self._dress(axes, "x", self.layout.get(_key(pair[0], "x"), {}))
            self._dress(axes, "y", self.layout.get(_key(pair[1], "y"), {}))
        return self.axes[pair]

    def _dress(self, axes: "Axes", letter: str, spec: dict[str, Any]) -> None:
        axis = axes.xaxis if letter == "x" else axes.yaxis
        axes.tick_params(axis=letter, labelsize=self.size(11), colors=_INK, length=3, which="both")  # type: ignore[arg-type]
        axes.tick_params(axis=letter, which="minor", length=0)  # type: ignore[arg-type]
        axes.spines[:].set_color("#b0b0b0")
        if spec.get("visible") is False:
            axes.set_axis_off()
        if spec.get("showgrid", True):
            axes.grid(visible=True, axis=letter, color=_PALE, linewidth=0.8)  # type: ignore[arg-type]
            axes.set_axisbelow(True)
        font = spec["title"].get("font", {}) if isinstance(spec.get("title"), dict) else {}
        axis.set_label_text(_title(spec), fontsize=self.size(font.get("size", 12)), color=_INK)
        if spec.get("showticklabels") is False:
            axes.tick_params(axis=letter, labelbottom=False, labelleft=False)  # type: ignore[arg-type]

    def finish(self, axes: "Axes", letter: str, spec: dict[str, Any]) -> None:
        """Scale, range and ticks of one axis, once everything is drawn on it."""
        from matplotlib import ticker

        axis = axes.xaxis if letter == "x" else axes.yaxis
        set_limits = axes.set_xlim if letter == "x" else axes.set_ylim
        logarithmic = spec.get("type") == "log"
        if logarithmic:
            (axes.set_xscale if letter == "x" else axes.set_yscale)("log")
            axis.set_minor_locator(ticker.NullLocator())
            axis.set_major_locator(ticker.LogLocator(numticks=6 if self.narrow else 10))
            if spec.get("exponentformat") == "none":
                axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
            low, high = axes.get_xlim() if letter == "x" else axes.get_ylim()
            if not 0 < low < high < np.inf:
                # No positive number was drawn, and matplotlib cannot tick a logarithmic axis without one.
                set_limits(1, 10)
        if "range" in spec:
            low, high = spec["range"]
            set_limits(*((10.0**low, 10.0**high) if logarithmic else (low, high)))
        if "tickvals" in spec:
            axis.set_major_locator(ticker.FixedLocator(_floats(spec["tickvals"]).tolist()))
            axis.set_major_formatter(ticker.FixedFormatter([_plain(text) for text in spec["ticktext"]]))
        elif not logarithmic and spec.get("type") != "category":
            stepped = letter == "x" and not spec.keys() & {"dtick", "tickformat"}
            whole = stepped or ("range" in spec and abs(spec["range"][1] - spec["range"][0]) > 2)
            # With at least one tick asked for instead of two, whole numbers stay whole even on a short axis.
            count, least, steps = 5 if self.narrow else 8, 1 if whole else 2, [1, 2, 2.5, 5, 10]
            spread = ticker.MaxNLocator(spec.get("nticks", count), integer=whole, min_n_ticks=least, steps=steps)
            axis.set_major_locator(ticker.MultipleLocator(spec["dtick"]) if spec.get("dtick") else spread)
            shown = "{:.0%}".format if spec.get("tickformat", "").endswith("%") else _short
            largest = max(map(abs, axes.get_xlim() if letter == "x" else axes.get_ylim()))
            if shown is not _short or not 1e-3 <= largest < 1e4:
                # matplotlib would write a factor such as 1e6 into the corner, where a heading may stand.
                axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: shown(value)))
            low, high = axes.get_xlim()
            if stepped and high - low < 0.5:
                # A single point: fractions of a step on the axis would be nonsense.
                axes.set_xlim((low + high) / 2 - 1, (low + high) / 2 + 1)

    def scatter(self, trace: dict[str, Any]) -> None:
        axes, line = self.at(trace), trace.get("line", {})
        x, y = _floats(trace.get("x", ())), _floats(trace.get("y", ()))
        colour, mode, name = line.get("color", "#2a78c2"), trace.get("mode", "lines"), self._label(trace)
        pair = (trace.get("xaxis", "x"), trace.get("yaxis", "y"))
        if "stackgroup" in trace:
            stack = (*pair, trace["stackgroup"])
            base = self.stacks.get(stack, np.zeros(y.shape))
            self.stacks[stack] = base + np.nan_to_num(y)
            axes.fill_between(
                x, base, self.stacks[stack], color=trace.get("fillcolor", colour), linewidth=0, label=name
            )
            axes.margins(x=0)
            return
        if trace.get("fill") == "tonexty" and len(self.last.get(pair, ())) == len(y):
            axes.fill_between(x, self.last[pair], y, color=_shade(trace["fillcolor"]), linewidth=0)
        self.last[pair] = y
        marker = trace.get("marker", {})
        axes.plot(
            x,
            y,
            color=colour,
            linestyle=_DASHES.get(line.get("dash", "solid"), "-") if "lines" in mode else "none",
            linewidth=self.size(line.get("width", 2)),
            marker="o" if "markers" in mode else "none",
            markersize=self.size(marker.get("size", 6)),
            markerfacecolor=shade if isinstance(shade := marker.get("color"), str) else colour,
            markeredgecolor="none",
            alpha=trace.get("opacity"),
            label=name,
        )

    def bar(self, trace: dict[str, Any]) -> None:
        axes, across = self.at(trace), trace.get("orientation") == "h"
        length = np.nan_to_num(_floats(trace.get("x" if across else "y", ())))
        pair = (trace.get("xaxis", "x"), trace.get("yaxis", "y"), "bar")
        base = self.stacks.get(pair, np.zeros(length.shape))
        self.stacks[pair] = base + length
        colour = trace.get("marker", {}).get("color", "#2a78c2")
        names = [_plain(str(name)) for name in trace.get("y" if across else "x", ())]
        if across:
            axes.barh(names, length, left=base, color=colour, height=0.6, label=self._label(trace))
        else:
            axes.bar(names, length, bottom=base, color=colour, width=0.4, label=self._label(trace))
            axes.set_xlim(-0.8, length.size - 0.2)

    def heatmap(self, trace: dict[str, Any]) -> None:
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.ticker import MaxNLocator

        axes = self.at(trace)
        z = np.array([_floats(row) for row in trace["z"]])
        shades = [(float(at), str(colour)) for at, colour in trace["colorscale"]]
        mesh = axes.pcolormesh(
            _edges(_floats(trace["x"])),
            _edges(_floats(trace["y"])),
            np.ma.masked_invalid(z),
            cmap=LinearSegmentedColormap.from_list("figure", shades),
            vmin=trace.get("zmin"),
            vmax=trace.get("zmax"),
        )
        axes.grid(visible=False)
        inset = axes.inset_axes((1.03, 0.0, 0.05, 1.0))
        bar = self.canvas.colorbar(mesh, cax=inset)
        if self.narrow:
            bar.locator = MaxNLocator(4)
        bar.ax.tick_params(labelsize=self.size(11), colors=_INK, length=3)
        bar.outline.set_visible(False)
        bar.set_label(_title(trace.get("colorbar", {})), fontsize=self.size(12), color=_INK)

    def _label(self, trace: dict[str, Any]) -> str:
        # A leading underscore is how matplotlib is told to leave an artist out of the legend.
        return _plain(str(trace.get("name", ""))) if trace.get("showlegend", True) else "_hidden"

    def shape(self, shape: dict[str, Any]) -> None:
        axes, line = self.at({"xaxis": shape.get("xref", "x"), "yaxis": "y"}), shape.get("line", {})
        if shape.get("yref") == "paper" and shape.get("type") == "rect":
            axes.axvspan(shape["x0"], shape["x1"], color=_shade(shape["fillcolor"]), linewidth=0, zorder=0)
            return
        dash, width = _DASHES.get(line.get("dash", "solid"), "-"), self.size(line.get("width", 1))
        look: dict[str, Any] = {"color": line.get("color", _INK), "linestyle": dash, "linewidth": width}
        if shape.get("yref") == "paper":
            axes.axvline(shape["x0"], **look)
        elif shape.get("type") == "line":
            axes.plot([shape["x0"], shape["x1"]], [shape["y0"], shape["y1"]], label="_shape", **look)

    def annotation(self, note: dict[str, Any]) -> None:
        from matplotlib.transforms import offset_copy

        axes, font = self.at({}), note.get("font", {})
        place = self.paper if note.get("xref") == "paper" else axes.transData
        axes.text(
            note["x"],
            note["y"],
            _plain(note["text"]),
            transform=offset_copy(place, self.canvas, y=self.size(note.get("yshift", 0)), units="points"),
            fontsize=self.size(font.get("size", 12)),
            fontweight="bold" if note["text"].startswith("<b>") else "normal",
            color=font.get("color", _INK),
            ha={"left": "left", "right": "right"}.get(note.get("xanchor", "center"), "center"),
            va={"top": "top", "bottom": "bottom"}.get(note.get("yanchor", "middle"), "center"),
        )

    def legend(self) -> "Legend | None":
        """Inside the plot where the layout says where, else to its right, or below a narrow one."""
        if not self.layout.get("showlegend") or not self.axes:
            return None
        found = [axes.get_legend_handles_labels() for axes in self.axes.values()]
        handles, labels = [h for pair in found for h in pair[0]], [text for pair in found for text in pair[1]]
        where = self.layout.get("legend", {})
        if where.get("traceorder") == "reversed":
            handles, labels = handles[::-1], labels[::-1]
        look: dict[str, Any] = {"fontsize": self.size(11), "labelcolor": _INK, "handlelength": 1.6}
        if not handles:
            return None
        if "x" in where and not self.narrow:
            look |= {"facecolor": "white", "framealpha": 0.8, "edgecolor": "none", "borderaxespad": 0}
            look["loc"] = f"{_VERTICAL[where.get('yanchor', 'top')]} {where.get('xanchor', 'left')}"
            self.at({}).legend(handles, labels, bbox_to_anchor=(where["x"], where["y"]), **look)
            return None
        below: dict[str, Any] = {"loc": "lower center", "ncols": 2, "columnspacing": 1.0}
        return self.canvas.legend(handles, labels, frameon=False, **look, **(below if self.narrow else _RIGHT))

    def arrange(self) -> None:
        """Choose the margins so that every label fits, then place each Axes by its domain.

        Labels decide the margins and margins decide the labels' ticks, so this measures five times.
        """
        renderer = self.canvas.canvas.get_renderer()  # type: ignore[attr-defined]
        width, height = self.canvas.bbox.width, self.canvas.bbox.height
        pad = 0.02 * min(width, height) + 2
        title = self.canvas.text(
            pad / width, 1 - pad / height, _title(self.layout), fontsize=self.size(15), color=_INK, va="top"
        )
        wide = title.get_window_extent(renderer).width
        title.set_fontsize(self.size(15) * min(1.0, (width - 2 * pad) / max(wide, 1)))
        legend = self.legend()
        box = legend.get_window_extent(renderer) if legend is not None else None
        top = pad + title.get_window_extent(renderer).height + pad
        if self.caption:
            # A letter is about half as wide as its size.
            lines = textwrap.wrap(self.caption, max(20, int((width - 2 * pad) / (11 * 0.52))))
            font: dict[str, Any] = {"fontsize": self.size(11), "color": _PALE_INK}
            words = self.canvas.text(pad / width, 1 - top / height, "\n".join(lines), va="top", **font)
            top += words.get_window_extent(renderer).height + pad
        right = pad + (box.width if box is not None and not self.narrow else 0)
        bottom = pad + (box.height if box is not None and self.narrow else 0)
        need = np.array([40.0, 40.0, 40.0, 20.0])
        for _ in range(5):
            left_edge, bottom_edge = (pad + need[0]) / width, (bottom + need[1]) / height
            right_edge, top_edge = 1 - (right + need[2]) / width, 1 - (top + need[3]) / height
            # A canvas too small for its labels still gets a plot, with labels cut off.
            right_edge, top_edge = max(right_edge, left_edge + 0.1), max(top_edge, bottom_edge + 0.1)
            self.area.set_points(np.array([[left_edge, bottom_edge], [right_edge, top_edge]]))
            self._place()
            inner = self.area.transformed(self.canvas.transFigure)
            boxes = [b for axes in self.axes.values() if (b := axes.get_tightbbox(renderer)) is not None]
            need = np.array(
                [
                    max([0.0, *(inner.x0 - b.x0 for b in boxes)]),
                    max([0.0, *(inner.y0 - b.y0 for b in boxes)]),
                    max([0.0, *(b.x1 - inner.x1 for b in boxes)]),
                    max([0.0, *(b.y1 - inner.y1 for b in boxes)]),
                ]
            )

    def _place(self) -> None:
        for (x, y), axes in self.axes.items():
            across = self.layout.get(_key(x, "x"), {}).get("domain", (0, 1))
            up = self.layout.get(_key(y, "y"), {}).get("domain", (0, 1))
            low = self.area.min + self.area.size * np.array([across[0], up[0]])
            size = self.area.size * np.array([across[1] - across[0], up[1] - up[0]])
            axes.set_position((low[0], low[1], size[0], size[1]))
            if "scaleanchor" in self.layout.get(_key(y, "y"), {}):
                axes.set_aspect("equal", adjustable="box", anchor="C")


def _match(page: _Page) -> None:
    """Give horizontal axes that match one another the same limits."""
    groups: dict[str, list[Axes]] = {}
    for (x, _), axes in page.axes.items():
        groups.setdefault(page.layout.get(_key(x, "x"), {}).get("matches", x), []).append(axes)
    for group in groups.values():
        if len(group) > 1:
            ends = [end for axes in group for end in axes.get_xlim()]
            for axes in group:
                axes.set_xlim(min(ends), max(ends))


def _draw(page: _Page, data: Sequence[dict[str, Any]]) -> None:
    kinds = {"scatter": page.scatter, "bar": page.bar, "heatmap": page.heatmap}
    page.at({})
    for trace in data:
        if trace.get("type", "scatter") in kinds:
            kinds[trace.get("type", "scatter")](trace)
    for shape in page.layout.get("shapes", ()):
        page.shape(shape)
    for (x, y), axes in page.axes.items():
        page.finish(axes, "x", page.layout.get(_key(x, "x"), {}))
        page.finish(axes, "y", page.layout.get(_key(y, "y"), {}))
    _match(page)
    for note in page.layout.get("annotations", ()):
        page.annotation(note)
    page.arrange()


def png(figure: dict[str, Any], width: int = 960, height: int = 600, dpi: int = 110, *, caption: bool = False) -> bytes:
    """Return a figure of `ntk_monitor.figures` as PNG bytes of exactly width × height pixels.

    `caption` prints the figure's tooltip under its title, for pictures that stand alone.
    `dpi` is only written into the file; sizes are pixels. Below 500 pixels of width the layout is the small one, for
    TensorBoard's Images tab, whose cards show at most 350 pixels. Needs matplotlib; costs about a quarter of a second.
    """
    # Artists and axes hold one another: two megabytes that would wait for a collection of everything, which may be many
    # pictures away. Without collections in between they are all young afterwards, and collecting the young is quick.
    enabled = gc.isenabled()
    gc.disable()
    try:
        return _printed(figure, width, height, dpi, caption)
    finally:
        if enabled:
            gc.collect(0)
            gc.enable()


def _printed(figure: dict[str, Any], width: int, height: int, dpi: int, caption: bool) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(width / dpi, height / dpi), dpi=dpi, facecolor="white")
    agg = FigureCanvasAgg(canvas)
    page = _Page(figure, canvas)
    page.caption = page.layout.get("meta", {}).get("tooltip", "") if caption else ""
    _draw(page, figure.get("data", ()))
    buffer = io.BytesIO()
    agg.print_png(buffer)  # type: ignore[no-untyped-call]
    return buffer.getvalue()
