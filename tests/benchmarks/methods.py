"""What is timed on a workload, method by method: yardsticks, torch routes to the kernel that people use, our engines.

J is (N, C, P) as a dict name → (N, C, p), K = J Jᵀ. Peers work in float32 throughout, as their users do.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional

import ntk_monitor as ntk
from tests import reference
from tests.benchmarks.networks import GPT
from tests.benchmarks.peers import nngeometry

Run = Callable[[], Tensor | None]
Jacobian = dict[str, Tensor]

ENGINES = {
    "structured": ("structured", torch.float32),
    "structured64": ("structured", torch.float64),
    "reference": ("reference", torch.float64),
    "rows": ("rows", torch.float64),
    "operator": ("operator", torch.float64),
}
"""Ours, as engine and dtype: a wrong kernel, or none, fails the benchmark.

The structured engine multiplies in the dtype of its result: in float32 like every peer, and in our default.
"""

CHUNK = 2**27
"""Bytes of Jacobian that the vmap of `jacrev` forms at a time: the fastest of 2**27 to 2**31 on these networks."""


def runs(method: str, model: nn.Module, x: Tensor) -> dict[str, Run]:
    """Return what a method does, by the quantity it yields; a kernel is returned for the check of its error."""
    if method in ENGINES:
        engine, dtype = ENGINES[method]
        call = partial(ntk.empirical_ntk, model, x, engine=cast("Any", engine), dtype=dtype)
        return {"trace": partial(call, outputs="trace"), "full": partial(call, outputs="full")}
    if method in ("backwards", "activations"):
        passes = backwards if method == "backwards" else activations
        return dict.fromkeys(("trace", "full"), lambda: passes(model, x))
    if method in ("step", "probe"):
        return {"monitor": training_step(model, x) if method == "step" else probe(model, x)}
    kernel = PEERS[method]
    return {"trace": lambda: kernel(model, x, "trace"), "full": lambda: kernel(model, x, "full")}


def backwards(model: nn.Module, x: Tensor) -> None:
    """C ordinary backward passes over the batch: the yardstick, and near the floor for an exact kernel."""
    y = model(x)
    for c in range(y.shape[1]):
        torch.autograd.grad(y[:, c].sum(), list(model.parameters()), retain_graph=True)


def activations(model: nn.Module, x: Tensor) -> None:
    """C backward passes that compute no weight gradient: what any exact route has to do before it contracts."""
    for p in model.parameters():
        p.requires_grad_(False)
    if isinstance(model, GPT):
        entry = model.embedded(x).requires_grad_()
        y = model.read(entry)
    else:
        entry = x.detach().requires_grad_()
        y = model(entry)
    for c in range(y.shape[1]):
        torch.autograd.grad(y[:, c].sum(), entry, retain_graph=True)


def single(model: nn.Module) -> Callable[[Jacobian, Tensor], Tensor]:
    """Return the network as a function of its parameters and one sample."""
    return lambda parameters, sample: functional_call(model, parameters, (sample.unsqueeze(0),)).squeeze(0)


def once(model: nn.Module, x: Tensor, outputs: str) -> Tensor:
    """The Jacobian of all samples, formed once by vmap(jacrev) in chunks, then contracted."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    row = vmap(jacrev(single(model)), (None, 0))
    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    jacobian = {name: p.new_empty(len(x), classes, p.numel()) for name, p in parameters.items()}
    width = max(1, CHUNK // (4 * classes * sum(p.numel() for p in parameters.values())))
    for start in range(0, len(x), width):
        for name, part in row(parameters, x[start : start + width]).items():
            jacobian[name][start : start + width] = part.flatten(2)
    return contracted(jacobian, outputs)


def loop(model: nn.Module, x: Tensor, outputs: str) -> Tensor:
    """The Jacobian row by row: one backward pass for each output of each sample, then contracted."""
    parameters = dict(model.named_parameters())
    jacobian: Jacobian = {}
    for n in range(len(x)):
        y = model(x[n : n + 1])[0]
        for c in range(len(y)):
            gradients = torch.autograd.grad(y[c], list(parameters.values()), retain_graph=True)
            for (name, p), g in zip(parameters.items(), gradients, strict=True):
                if name not in jacobian:
                    jacobian[name] = p.new_empty(len(x), len(y), p.numel(), requires_grad=False)
                jacobian[name][n, c] = g.flatten()
    return contracted(jacobian, outputs)


def contracted(jacobian: Jacobian, outputs: str) -> Tensor:
    """Return J Jᵀ, summed over parameters, by one matrix product each."""
    n, c, _ = next(iter(jacobian.values())).shape
    parts = [part.flatten(1) if outputs == "trace" else part.flatten(0, 1) for part in jacobian.values()]
    total = torch.stack([rows @ rows.T for rows in parts]).sum(0)
    return total if outputs == "trace" else total.reshape(n, c, n, c)


def tutorial(model: nn.Module, x: Tensor, outputs: str) -> Tensor:
    """The recipe of the torch.func tutorial on neural tangent kernels: J twice, all at once, one einsum per parameter.

    Source: pytorch.org/tutorials/intermediate/neural_tangent_kernels, "jacobian contraction".
    """
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    row = vmap(jacrev(single(model)), (None, 0))
    left = [j.flatten(2) for j in row(parameters, x).values()]
    right = [j.flatten(2) for j in row(parameters, x).values()]
    rule = "Naf,Maf->NM" if outputs == "trace" else "Naf,Mbf->NMab"
    total = torch.stack([torch.einsum(rule, a, b) for a, b in zip(left, right, strict=True)]).sum(0)
    return total if outputs == "trace" else total.permute(0, 2, 1, 3)


def exact(model: nn.Module, x: Tensor, _: str) -> Tensor:
    """The float64 twin on the CPU, gradient by gradient."""
    x = x.cpu().double() if x.is_floating_point() else x.cpu()
    model = model.cpu().double()
    parts = reference.rows(model, model(x)).values()
    kernel = torch.stack([part.flatten(0, 1) @ part.flatten(0, 1).T for part in parts]).sum(0)
    return kernel.reshape(len(x), -1, len(x), len(kernel) // len(x))


PEERS: dict[str, Callable[[nn.Module, Tensor, str], Tensor]] = {
    "jacrev": once,
    "tutorial": tutorial,
    "loop": loop,
    "nngeometry": nngeometry,
    "exact": exact,
}


def training_step(model: nn.Module, x: Tensor) -> Run:
    """One step of the demo's training on a batch of 64: forward, cross-entropy, backward, AdamW."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters())
    x = x[:64]
    classes = torch.arange(len(x), device=x.device) % 10

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), classes).backward()
        optimizer.step()

    return step


def probe(model: nn.Module, x: Tensor) -> Run:
    """What the monitor does at one due step, the Gram image and the writing left out."""
    classes = torch.arange(len(x), device=x.device) % 10
    monitor = ntk.Monitor(model, None, (x, classes), "cross_entropy", gram_every=0, strict=True)

    def take() -> None:
        monitor.snapshot(monitor.probes)

    return take

    return take
