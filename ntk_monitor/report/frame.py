"""What every page is made of: the frame around its sections, places for figures, and plotly.js in the file."""

import html
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ntk_monitor.atomic import whole
from ntk_monitor.errors import InputError
from ntk_monitor.figures import Figure


def framed(
    title: str, body: str, specs: Mapping[str, Figure], others: Mapping[str, Sequence[Figure]] | None = None
) -> str:
    """Return a page as HTML that needs no other file.

    Args:
        title: of the window.
        body: sections, in HTML.
        specs: figures by the keys of their places.
        others: what a reader can turn some of them to, in the order of the choices.

    Raises:
        InputError: no plotly package to take plotly.js from.
    """
    return "".join(
        (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)} · ntk_monitor</title><style>{_static('page.css')}</style></head>\n",
            f'<body>{body}\n<script type="application/json" id="figures">{_json(specs)}</script>',
            f'\n<script type="application/json" id="others">{_json(others or {})}</script>',
            f"\n<script>{plotly()}</script>\n<script>{_static('page.js')}</script></body></html>\n",
        )
    )


def head(links: str, about: str = "") -> str:
    """Return the top of a page: what it is about, links in HTML, and the switch between light and dark."""
    words = f'<p class="about">{html.escape(about)}</p>' if about else ""
    return (
        f'<header><h1>ntk_monitor</h1><nav>{links}</nav><button id="theme" title="light or dark">◐</button>'
        f"{words}</header>\n"
    )


def place(key: str, tells: str, *, wide: bool = False, about: str = "", kernel: str = "", axis: str = "") -> str:
    """Return where a figure is drawn, and what it tells.

    Args:
        key: of the figure.
        tells: how to read it, in a sentence.
        wide: over the whole width of the page.
        about: what it shows, in smaller letters.
        kernel: which kernel it is about, shown when a reader asks.
        axis: which choice of the run it follows.
    """
    size = ' class="wide"' if wide else ""
    follows = f' data-axis="{html.escape(axis)}"' if axis else ""
    which = f' <abbr title="{html.escape(kernel)}">which kernel?</abbr>' if kernel else ""
    more = f'<span class="more">{html.escape(about)}{which}</span>' if about or kernel else ""
    return (
        f'<figure{size}><div class="plot" id="{html.escape(key)}"{follows}></div>'
        f"<figcaption>{html.escape(tells)}{more}</figcaption></figure>"
    )


def saved(text: str, path: str | os.PathLike[str]) -> Path:
    """Write a page to a file that is whole whenever it can be seen, and return its path.

    Raises:
        OSError: the file cannot be written.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole(target) as part:
        part.write_text(text, encoding="utf-8")
    return target


def plotly() -> str:
    """Return plotly.js, without importing plotly, which takes a second.

    Raises:
        InputError: plotly is not installed.
    """
    spec = importlib.util.find_spec("plotly")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        script = Path(folder) / "package_data" / "plotly.min.js"
        if script.is_file():
            return script.read_text(encoding="utf-8").replace("</script", "<\\/script")
    raise InputError("a report needs plotly.js, which the plotly package brings; pip install plotly")


def _json(specs: Mapping[str, Any]) -> str:
    # A closing tag inside a string would end the script element.
    return json.dumps(specs, allow_nan=False, separators=(",", ":")).replace("</", "<\\/")


def _static(name: str) -> str:
    return resources.files("ntk_monitor.report").joinpath(name).read_text(encoding="utf-8")
