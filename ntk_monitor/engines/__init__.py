"""Exact routes to the same kernel. Each engine yields blocks of the Jacobian; `contract` turns blocks into the kernel."""
