"""The routes of the tab: read-only, every answer JSON, every failure a sentence."""

import functools
import logging
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, TypeAlias

from tensorboard.backend.http_util import Respond
from tensorboard.plugin_util import context, experiment_id
from tensorboard.plugins.base_plugin import FrontendMetadata, TBContext, TBPlugin
from werkzeug import wrappers

from ntk_monitor.dashboard import answers, files, payload
from ntk_monitor.dashboard.source import Asked
from ntk_monitor.dashboard.store import Store
from ntk_monitor.errors import HistoryError, InputError

App: TypeAlias = Callable[..., Any]
Query: TypeAlias = Mapping[str, str]

logger = logging.getLogger(__name__)


class NTKPlugin(TBPlugin):  # type: ignore[misc]  # tensorboard has no types
    """Answers the page's questions about the runs of one logdir."""

    plugin_name = "ntk"

    def __init__(self, context: TBContext) -> None:
        self._store = Store(context.data_provider)

    def is_active(self) -> bool:
        """Return False: TensorBoard activates the tab itself where a run holds our data."""
        return False

    def frontend_metadata(self) -> FrontendMetadata:
        """Return where the page begins and what its tab is called."""
        return FrontendMetadata(es_module_path="/index.js", tab_name="NTK")

    def get_plugin_apps(self) -> dict[str, App]:
        """Return the routes, below data/plugin/ntk."""
        asked = {"runs": self._runs, "catalogue": self._catalogue, "manifest": self._manifest, "figure": self._figure}
        return {
            "/index.js": _file("index.js"),
            "/static/*": _static,
            "/plotly.js": _plotly,
            **{f"/{name}": _answering(answer) for name, answer in asked.items()},
        }

    def _runs(self, asked: Asked, _: Any) -> Any:
        return {"runs": self._store.names(asked)}

    def _catalogue(self, asked: Asked, _: Any) -> Any:
        from ntk_monitor.report.panels import GROUPS

        panels = [
            {"name": name, "group": group, "wide": wide, "several": False, "depends": [], "tells": ""}
            for name, group, wide in _SKELETON
        ]
        version = metadata.version("ntk-monitor")
        return {"groups": GROUPS, "panels": panels, "about": answers.ABOUT, "version": version}

    def _manifest(self, asked: Asked, query: Any) -> Any:
        run = query["run"]
        try:
            history = self._store.history(asked, run)
        except HistoryError as error:
            return {"run": run, "error": str(error), "steps": [], "version": ""}
        return answers.manifest(run, history, self._store.version(asked, run), self._store.stored(asked, run, "gram"))

    def _figure(self, asked: Asked, query: Any) -> Any:
        from ntk_monitor.report.panels import panels

        focus = query.get("focus") or query["run"]
        history = self._store.history(asked, focus)
        return next(one.figure for one in panels(history) if one.name == query["panel"])


_SKELETON = (
    ("learning-rate-interval", "learning rate", False),
    ("learning-rates", "learning rate", False),
    ("loss-forecast", "loss", False),
    ("forecast-error", "loss", False),
    ("residual-reach", "residual", False),
    ("residual-bands", "residual", False),
    ("named-residuals", "residual", False),
    ("mode-decay", "residual", False),
    ("layer-updates", "layers", False),
    ("spectrum", "kernel", False),
    ("spectrum-over-training", "kernel", False),
    ("scalars", "numbers", True),
)


def _answering(answer: Callable[[Asked, Any], Any]) -> App:
    """Return the application of a question: its answer as JSON, or a sentence and no traceback."""

    @wrappers.Request.application
    @functools.wraps(answer)
    def app(request: wrappers.Request) -> Any:
        asked = Asked(context(request.environ), experiment_id(request.environ))
        try:
            return Respond(request, payload.text(answer(asked, request.args)), "application/json")
        except (InputError, HistoryError, ValueError, LookupError) as error:
            return Respond(request, payload.text({"error": str(error)}), "application/json", code=400)
        except Exception as error:
            logger.exception("the NTK tab could not answer %s", request.path)
            return Respond(request, payload.text({"error": f"{type(error).__name__}"}), "application/json", code=500)

    return app


def _file(name: str) -> App:
    @wrappers.Request.application
    def app(request: wrappers.Request) -> Any:
        suffix = "." + name.rpartition(".")[2]
        try:
            return Respond(request, files.content(name), files.TYPES[suffix])
        except KeyError:
            return Respond(request, payload.text({"error": "no such file"}), "application/json", code=404)

    return app


def _static(environ: Any, start_response: Any) -> Any:
    return _file(environ["PATH_INFO"].rpartition("/static/")[2])(environ, start_response)


@wrappers.Request.application
def _plotly(request: wrappers.Request) -> Any:
    try:
        return Respond(request, files.plotly(), "text/javascript", content_encoding="gzip", expires=86400)
    except KeyError:
        return Respond(request, payload.text({"error": "plotly is not installed"}), "application/json", code=404)
