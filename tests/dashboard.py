"""The tab without a socket: event files in a folder, TensorBoard's Python data server, and its WSGI application."""

import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorboard.backend.application import TensorBoardWSGI
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.base_plugin import TBContext
from werkzeug.test import Client, TestResponse

from ntk_monitor.dashboard.loader import NTKLoader
from ntk_monitor.events import event
from ntk_monitor.recorder import beginning, encoded
from ntk_monitor.snapshot import Snapshot


def recorded(folder: Path, snapshots: Sequence[Snapshot], prefix: str = "ntk", name: str = "1700000000.test.0") -> Path:
    """Append probes to an event file in a run's folder and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"events.out.tfevents.{name}"
    with path.open("ab") as file:
        if not file.tell():
            file.write(beginning(1.7e9))
        file.write(encoded([event(snapshot, prefix) for snapshot in snapshots]))
    return path


@dataclass
class Tab:
    """The plugin as TensorBoard serves it from one logdir, probes read as `reload` finds them."""

    logdir: Path

    def __post_init__(self) -> None:
        flags = Namespace(samples_per_plugin={}, logdir=str(self.logdir))
        loader = NTKLoader()
        loader.fix_flags(flags)
        self.multiplexer = EventMultiplexer(tensor_size_guidance=flags.samples_per_plugin)
        self.provider = MultiplexerDataProvider(self.multiplexer, str(self.logdir))
        plugin = loader.load(TBContext(data_provider=self.provider, logdir=str(self.logdir), flags=flags))
        assert plugin is not None
        self.plugin = plugin
        self.client = Client(TensorBoardWSGI([self.plugin], "", self.provider))
        self.reload()

    def reload(self) -> None:
        self.multiplexer.AddRunsFromDirectory(str(self.logdir))
        self.multiplexer.Reload()

    def get(self, route: str, method: str = "GET", **query: Any) -> TestResponse:
        return self.client.open(f"/data/plugin/ntk/{route}", method=method, query_string=query)

    def json(self, route: str, code: int = 200, **query: Any) -> Any:
        response = self.get(route, **query)
        assert response.status_code == code, response.get_data(as_text=True)
        assert response.mimetype == "application/json"
        return json.loads(response.get_data(as_text=True), parse_constant=_refused)


def _refused(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")
