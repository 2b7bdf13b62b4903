"""The routes of the tab: read-only, every answer JSON, every failure a sentence."""

import contextlib
import logging
import threading
from collections.abc import Callable
from typing import Any, TypeAlias

from tensorboard.backend.http_util import Respond
from tensorboard.errors import PublicError
from tensorboard.plugin_util import context, experiment_id
from tensorboard.plugins.base_plugin import FrontendMetadata, TBContext, TBPlugin
from werkzeug import wrappers

from ntk_monitor.dashboard import collector, files, payload
from ntk_monitor.dashboard.bulk import Asked
from ntk_monitor.dashboard.query import Query
from ntk_monitor.errors import HistoryError, InputError

App: TypeAlias = Callable[..., Any]

logger = logging.getLogger(__name__)

_JSON = "application/json"
_QUESTIONS = ("runs", "catalogue", "version", "manifest", "figure", "cards", "findings", "modes", "mode", "sample")


class NTKPlugin(TBPlugin):  # type: ignore[misc]  # tensorboard has no types
    """Answers the page's questions about the runs of one logdir. What draws is loaded at the first question."""

    plugin_name = "ntk"

    def __init__(self, context: TBContext) -> None:
        self._provider = context.data_provider
        self._routes: dict[str, Callable[[Asked, Query], Any]] = {}
        self._lock = threading.Lock()

    def is_active(self) -> bool:
        """Return False: TensorBoard activates the tab itself where a run holds our data."""
        return False

    def frontend_metadata(self) -> FrontendMetadata:
        """Return where the page begins and what its tab is called."""
        return FrontendMetadata(es_module_path="/index.js", tab_name="NTK")

    def get_plugin_apps(self) -> dict[str, App]:
        """Return the routes, below data/plugin/ntk."""
        return {
            "/index.js": _app(self._index),
            "/static/*": _app(lambda request: _file(request, request.path.rpartition("/static/")[2])),
            "/plotly.js": _app(_plotly),
            **{f"/{name}": _app(self._question(name)) for name in _QUESTIONS},
        }

    def _index(self, request: wrappers.Request) -> Any:
        # The page is about to ask; what takes a moment to load is there by then.
        threading.Thread(target=self._prepare, daemon=True).start()
        return _file(request, "index.js")

    def _prepare(self) -> None:
        self._answers()
        with contextlib.suppress(FileNotFoundError):
            files.plotly()

    def _answers(self) -> dict[str, Callable[[Asked, Query], Any]]:
        """Return what answers each question, loaded at the first call."""
        with self._lock:
            if not self._routes:
                from ntk_monitor.dashboard.answers import Answers
                from ntk_monitor.dashboard.store import Store

                self._routes = Answers(Store(self._provider)).routes
            return self._routes

    def _question(self, name: str) -> Callable[[wrappers.Request], Any]:
        def answered(request: wrappers.Request) -> Any:
            asked = Asked(context(request.environ), experiment_id(request.environ))
            with collector.paused():
                answer = self._answers()[name](asked, Query(request.args))
                written = answer if isinstance(answer, str) else payload.text(answer)
            return Respond(request, written, _JSON)

        return answered


def _app(answered: Callable[[wrappers.Request], Any]) -> App:
    """Return the WSGI application of a route: it reads only, and no failure of it is a traceback."""

    @wrappers.Request.application
    def app(request: wrappers.Request) -> Any:
        if request.method not in ("GET", "HEAD"):
            return _sorry(request, f"wanted GET, got {request.method}", 405)
        try:
            return answered(request)
        except FileNotFoundError as error:
            return _sorry(request, str(error), 404)
        except (InputError, HistoryError) as error:
            return _sorry(request, str(error), 400)
        except PublicError as error:
            return _sorry(request, f"TensorBoard's data server refused: {error}", error.http_code)
        except Exception as error:  # the rest of TensorBoard goes on, and its terminal says what happened here
            logger.exception("the NTK tab could not answer %s", request.path)
            return _sorry(request, f"{type(error).__name__} in the NTK tab; TensorBoard's terminal says where", 500)

    return app


def _sorry(request: wrappers.Request, sentence: str, code: int) -> Any:
    return Respond(request, payload.text({"error": sentence}), _JSON, code=code)


def _file(request: wrappers.Request, name: str) -> Any:
    content, kind = files.content(name)
    return Respond(request, content, kind)


def _plotly(request: wrappers.Request) -> Any:
    # A day in the browser's cache; the page asks with the version in the URL.
    return Respond(request, files.plotly(), "text/javascript", content_encoding="gzip", expires=86400)
