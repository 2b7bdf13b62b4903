"""Exact routes to the same kernel: an engine yields blocks of the Jacobian, `contract` turns them into the kernel."""
