"""Does a network talk to other processes? One that does cannot be run by rank 0 alone: the others would not answer."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from ntk_monitor.errors import NetworkError

# Namespaces of operations that exchange something.
_SPEECH = ("c10d", "_c10d_functional", "_c10d_functional_autograd")


class SpeechError(NetworkError):
    """A network that was to run on one process called for the others."""


class Silence(TorchDispatchMode):
    """Refuses every collective operation before it begins, forwards and backwards.

    Raises:
        SpeechError: a collective was called.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: else newer versions of torch import their compiler, a second of work, to keep it out of here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in _SPEECH:
            raise SpeechError(
                f"the network talks to other processes while it runs ({func.__name__}), and a probe runs on one of "
                "them; measure a network whose forward is local, or pass forward=callable(module, inputs)"
            )
        return func(*args, **(kwargs or {}))
