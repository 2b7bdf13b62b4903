"""What ntk_monitor raises. Every message says what was wanted, what was got and what to do.

NTKMonitorError
├── InputError      a batch, probe, target or option that cannot be used
│   └── LossUnknownError    what was asked for needs the loss
├── NetworkError    a module whose parameters or outputs cannot be followed exactly
├── NumericsError   a kernel that is not finite, so that no spectrum exists
├── CheckpointError a checkpoint that cannot be read, trusted or fitted to a model
└── HistoryError    event files that hold no readable history
    └── DamagedRecordError    one record that holds other bytes than were written
"""


class NTKMonitorError(Exception):
    """Base of everything this package raises on purpose."""


class InputError(NTKMonitorError, ValueError):
    """A batch, probe, target or option cannot be used as given."""


class LossUnknownError(InputError):
    """What was asked for needs the loss, and the loss is not known."""


class NetworkError(NTKMonitorError):
    """A module's parameters or outputs cannot be followed exactly."""


class NumericsError(NTKMonitorError, ArithmeticError):
    """A kernel holds NaN or infinity, so that no spectrum exists."""


class CheckpointError(NTKMonitorError):
    """A checkpoint cannot be read, is not trusted, or does not fit the model."""


class HistoryError(NTKMonitorError):
    """Event files are missing or hold no readable history."""


class DamagedRecordError(HistoryError):
    """One record of an event file holds other bytes than were written."""


def said(error: BaseException, kind: bool | None = None) -> str:
    """Return the first line of an error: ours speak for themselves, others with their type (or as `kind` says)."""
    try:
        line = (str(error).strip().splitlines() or ["no message"])[0][:300]
    except Exception:  # noqa: BLE001 - others' errors may fail at describing themselves
        line = "no message"
    shown = not isinstance(error, NTKMonitorError) if kind is None else kind
    return f"{type(error).__name__}: {line}" if shown else line
