"""The structured engine: exact kernels without a Jacobian, from the inputs and output gradients of each operation.

One forward pass records where parameters enter (`tap`), C backward passes bring the gradient of every such operation's
output, `samples` says which of its positions belongs to which sample, `operations` knows how each kind of operation
turns the two into parameter gradients, and `contraction` multiplies them layer by layer. `engine` puts it together.
"""
