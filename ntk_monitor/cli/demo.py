"""Train a small network on real data and watch its kernel.

A convolutional network learns scikit-learn's handwritten digits for about
a minute while NTKMonitor measures its tangent kernel. Ends with a table in
plain words, an HTML report, the figures as PNG files and the TensorBoard
command.
"""

import contextlib
import itertools
import shlex
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from ntk_monitor.errors import InputError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser
    from rich.console import Console

    from ntk_monitor.history import History

EXAMPLE = "ntk-monitor demo --epochs 18 --out runs/demo"

# Only the monitor's scalars, unsmoothed: TensorBoard's default smoothing bends a curve of twenty points out of shape.
VIEW = "?tagFilter=ntk%2F&smoothing=0#timeseries"


def add(parser: "ArgumentParser") -> None:
    """Declare the options."""
    parser.add_argument("--epochs", type=int, default=18, metavar="N", help="passes over the training data")
    parser.add_argument("--every", type=int, default=20, metavar="N", help="optimizer steps between two probes")
    parser.add_argument(
        "--out",
        type=str,
        default="runs/demo",
        metavar="DIR",
        help="directory of the run; -2, -3, ... is appended when it already holds one",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the order of batches")
    parser.add_argument("--open", action="store_true", help="start TensorBoard at the end and open it in the browser")


def run(epochs: int, every: int, out: str, seed: int, open: bool) -> int:  # noqa: A002 -- the option's name
    """Train, then show what the run's own record says. Returns 0, or 130 after Ctrl-C."""
    if epochs < 1:
        raise InputError(f"--epochs must be at least 1, got {epochs}; try --epochs 18")
    if every < 1:
        raise InputError(f"--every must be at least 1, got {every}; try --every 20")
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed must be between 0 and 2**32 - 1, got {seed}")
    directory = _free(Path(out))
    from rich.console import Console

    console = Console(highlight=False)
    console.print("A small convolutional network learns handwritten digits (scikit-learn, 8 x 8).")
    accuracy = _train(epochs, every, directory, seed, console)
    from ntk_monitor.cli.words import print_summary
    from ntk_monitor.history import load_history
    from ntk_monitor.report import write

    history = load_history(directory)
    print_summary(history, console)
    _draw(history, directory / "figures")
    write({directory.name: history}, directory / "report.html")
    if accuracy is None:
        console.print("Interrupted: what was measured until then is kept.")
    else:
        console.print(f"Validation accuracy: {accuracy:.1%} of 360 digits that were not trained on.")
    console.print(
        "The demo probes often, so that there is something to see; by default NTKMonitor keeps to 2 % of the time.\n"
    )
    _print_places(directory, console)
    if open and accuracy is not None:
        _open(directory, console)
    return 130 if accuracy is None else 0


def _free(wanted: Path) -> Path:
    """Return the directory, or the first of DIR-2, DIR-3, ... without a run: two runs in one read as a resumed one."""
    for number in itertools.count(1):
        directory = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        if directory.exists() and not directory.is_dir():
            raise InputError(f"--out must be a directory, got the file {directory}; pass another path")
        if not any(directory.glob("events.out.tfevents.*")):
            directory.mkdir(parents=True, exist_ok=True)
            return directory
    raise AssertionError


def _train(epochs: int, every: int, directory: Path, seed: int, console: "Console") -> float | None:
    """Train with the monitor and return the validation accuracy, or None when the user interrupted."""
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.loggers import TensorBoardLogger

    from ntk_monitor.callbacks import NTKMonitor
    from ntk_monitor.cli.digits import Digits, loaders
    from ntk_monitor.cli.progress import Line, quiet

    with quiet():
        torch.manual_seed(seed)
        monitor = NTKMonitor(every_n_steps=every, gram_every=4, seed=seed)
        train, held_out = loaders(seed)
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            callbacks=[monitor, Line(monitor, console)],
            logger=TensorBoardLogger(directory, name="", version="", default_hp_metric=False),
            log_every_n_steps=5,
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        on_interrupt = signal.getsignal(signal.SIGINT)
        try:
            trainer.fit(Digits(), train, held_out)
        except SystemExit:
            # Lightning turns Ctrl-C into an exit with code 1 and leaves SIGINT ignored.
            if not trainer.interrupted:
                raise
            signal.signal(signal.SIGINT, on_interrupt)
    return None if trainer.interrupted else float(trainer.callback_metrics["val_accuracy"])


def _draw(history: "History", directory: Path) -> None:
    """Write every figure as PNG."""
    from ntk_monitor import figures
    from ntk_monitor.render import png

    shown = history.measured
    drawn = {
        "spectrum": figures.spectrum(shown),
        "spectrum_over_training": figures.spectrum_over_training(shown),
        "residual_bands": figures.residual_bands(shown),
        "learning_rate_interval": figures.learning_rate_interval(shown),
        "loss_forecast": figures.loss_forecast(shown),
        "layer_updates": figures.layer_updates(shown),
        "scalars": figures.scalars(shown),
    }
    for last in [snapshot for snapshot in shown if snapshot.gram.size][-1:]:
        drawn["gram"] = figures.gram(last, cosine=True)
    directory.mkdir(exist_ok=True)
    for name, figure in drawn.items():
        (directory / f"{name}.png").write_bytes(png(figure, caption=True))


def _print_places(directory: Path, console: "Console") -> None:
    places = {
        "report": f"{directory / 'report.html'}",
        "figures": f"{directory / 'figures'}/*.png",
        "record": f"{directory}, read back by ntk_monitor.load_history({str(directory)!r})",
        "TensorBoard": f"{_tensorboard()} --logdir {shlex.quote(str(directory))}",
        "then open": "http://localhost:6006/#ntk",
        "its scalars": f"http://localhost:6006/{VIEW}",
        "": 'where to untick "Ignore outliers" in its settings, which hides the first probes',
    }
    for name, place in places.items():
        # Lines to copy are never broken.
        console.print(f"{name:<11}  {place}", soft_wrap=True, markup=False)


def _tensorboard() -> str:
    """Return how this environment's TensorBoard is called from this shell."""
    beside = Path(sys.executable).with_name("tensorboard")
    found = shutil.which("tensorboard")
    if not beside.exists() or (found is not None and Path(found) == beside):
        return "tensorboard"
    inside = beside.is_relative_to(Path.cwd())
    return shlex.quote(str(beside.relative_to(Path.cwd()) if inside else beside))


def _open(directory: Path, console: "Console") -> None:
    """Serve the run until Ctrl-C."""
    import webbrowser

    from tensorboard.program import TensorBoard

    server = TensorBoard()
    server.configure(argv=["tensorboard", "--logdir", str(directory)])
    address = f"{server.launch()}{VIEW}"
    console.print(f"\nTensorBoard runs at {address}; end it with Ctrl-C.", soft_wrap=True, markup=False)
    webbrowser.open(address)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
