"""The NTK tab of TensorBoard: a plugin that answers read-only questions about runs, and the page that asks them.

Imports nothing but the standard library, tensorboard and numpy, because TensorBoard loads plugins unguarded: an import
that fails here would keep all of TensorBoard from starting.
"""
