"""What TensorBoard imports at its start: as little as possible, and nothing that can fail."""

from argparse import Namespace
from typing import TYPE_CHECKING

from tensorboard.plugins.base_plugin import TBContext, TBLoader

if TYPE_CHECKING:
    from ntk_monitor.dashboard.plugin import NTKPlugin

_NAME = "ntk"


class NTKLoader(TBLoader):  # type: ignore[misc]  # tensorboard has no types
    """Makes TensorBoard keep every probe, and opens the tab when it is asked for."""

    def fix_flags(self, flags: Namespace) -> None:
        """Ask both data servers for all steps of our tags, unless the user chose a number of them.

        Without it they keep a random hundred or ten of them, and the first probe is among those that go.
        """
        chosen = dict(getattr(flags, "samples_per_plugin", None) or {})
        flags.samples_per_plugin = {_NAME: 0} | chosen

    def load(self, context: TBContext) -> "NTKPlugin | None":
        """Return the plugin, or None where TensorBoard has no data server to read from."""
        from ntk_monitor.dashboard.plugin import NTKPlugin

        return NTKPlugin(context) if context.data_provider is not None else None
