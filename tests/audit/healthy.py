"""Twenty-one runs that a competent person would call fine."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.audit import data, networks, training
from tests.audit.runs import Case, Job, accuracy, determination
from tests.audit.training import Optimize, Schedule, Task, adamw, sgd

BatchNorm = nn.BatchNorm2d


def images(
    net: Callable[[], nn.Module],
    optimize: Optimize,
    schedule: Schedule | None,
    batch: int,
    epochs: int,
    *,
    smoothing: float = 0.0,
    reduction: str = "mean",
    standard: bool = False,
    probes: int = 14,
    **options: Any,
) -> Callable[[], Job]:
    """Classify digits."""

    def make() -> Job:
        split = data.digits(standard=standard)
        loss = partial(F.cross_entropy, label_smoothing=smoothing, reduction=reduction)
        loader = split.loader(batch)
        task = Task(net(), loss, optimize, schedule)
        return Job(task, loader, epochs * len(loader), accuracy(split.held_x, split.held_y), probes, options)

    return make


def table(
    split: Callable[[], data.Split],
    net: Callable[[], nn.Module],
    loss: Callable[[Tensor, Tensor], Tensor],
    optimize: Optimize,
    schedule: Schedule | None,
    *,
    batch: int,
    epochs: int,
) -> Callable[[], Job]:
    """Fit a table: R² of numbers, or accuracy where the loss is for yes and no."""

    def make() -> Job:
        held = split()
        loader = held.loader(batch)
        score = accuracy if loss is F.binary_cross_entropy_with_logits else determination
        task = Task(net(), loss, optimize, schedule)
        return Job(task, loader, epochs * len(loader), score(held.held_x, held.held_y))

    return make


def token_loss(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f.flatten(0, 1), y.flatten())


def shifted_loss(f: Tensor, y: Tensor) -> Tensor:
    """As causal language models of the transformers library compute it inside."""
    return token_loss(f[:, :-1], y[:, 1:])


def bits(loss: Callable[[Tensor, Tensor], Tensor], windows: data.Windows) -> Callable[[nn.Module], float]:
    """Negative bits per character on held-out text."""

    def score(module: nn.Module) -> float:
        items = [windows[i] for i in range(len(windows))]
        parts = [(i["input_ids"], i["labels"]) if isinstance(i, dict) else i for i in items]
        x, y = torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts])
        with torch.no_grad():
            return -float(loss(module(x), y)) / math.log(2)

    return score


def gpt_written() -> Job:
    """Characters of English prose, as nanoGPT trains: warm-up, cosine, clipping, two groups."""
    text, held = data.prose()
    net = networks.GPT(len(data.ALPHABET), 32)
    optimize = training.adamw_without_decay_of_vectors(4e-3, 0.1)
    task = Task(net, token_loss, optimize, training.warm_cosine)
    score = bits(token_loss, data.Windows(held, 32, stride=32))
    loader = data.shuffled(data.Windows(text, 32), 32)
    return Job(task, loader, 500, score, options={"gradient_clip_val": 1.0})


def gpt_library() -> Job:
    """GPT-2 of the transformers library from scratch: dropout, accumulation over two batches, dicts of tokens."""
    text, held = data.prose()
    task = Task(networks.gpt2(len(data.ALPHABET), 32), shifted_loss, adamw(4e-3), training.warm_up)
    score = bits(shifted_loss, data.Windows(held, 32, as_dict=True, stride=32))
    loader = data.shuffled(data.Windows(text, 32, as_dict=True), 16)
    return Job(task, loader, 300, score, options={"accumulate_grad_batches": 2})


def _pretrained() -> nn.Module:
    net = networks.gpt2(len(data.ALPHABET), 32)
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3)
    loader = data.shuffled(data.Windows(data.prose()[0], 32), 32)
    for step, (x, y) in enumerate(loader):
        loss = token_loss(net(x).logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 200:
            break
    return net


def lora_language() -> Job:
    """Adapters of rank 4 on a pretrained GPT-2, that knows prose, fine-tuned on a program."""
    import peft

    base: Any = _pretrained()
    options = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.05, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True
    )
    net: nn.Module = peft.get_peft_model(base, options)
    text, held = data.program()
    loader = data.shuffled(data.Windows(text, 32, as_dict=True), 16)
    score = bits(shifted_loss, data.Windows(held, 32, as_dict=True, stride=16))
    return Job(Task(net, shifted_loss, adamw(5e-3), training.warm_cosine), loader, 200, score)


def lora_vision() -> Job:
    """Adapters and a new head on a ViT that knows the digits 0 to 4, for the digits 5 to 9."""
    import peft

    known, new = data.digits(range(5)), data.digits(range(5, 10))
    base = networks.ViT()
    optimizer = torch.optim.AdamW(base.parameters(), lr=3e-3)
    for _ in range(8):
        for x, y in known.loader(64):
            loss = F.cross_entropy(base(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    base.head = nn.Linear(32, 5)
    options = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["qkv", "out", "up", "down"], modules_to_save=["head"])
    net: nn.Module = peft.get_peft_model(base, options)
    loader = new.loader(32)
    task = Task(net, F.cross_entropy, adamw(5e-3, weight_decay=0.0), training.cosine)
    return Job(task, loader, 15 * len(loader), accuracy(new.held_x, new.held_y))


def _heat(u: Tensor, slope: Tensor, x: Tensor) -> Tensor:
    """Heat equation, (t, x): ∂u/∂t = 0.2 ∂²u/∂x²."""
    return slope[:, :1] - 0.2 * networks.second(slope, x, 1)


def _decay(u: Tensor, slope: Tensor, x: Tensor) -> Tensor:
    """Decay: u̇ + u = 0."""
    return slope + u


def _fit(module: nn.Module, x: Tensor, truth: Tensor) -> float:
    """1 minus the relative error of the solution."""
    with torch.no_grad():
        guess = module.net.u(x)  # type: ignore[operator, union-attr] # a PINN
    return 1 - float((guess - truth).norm() / truth.norm())


def pinn_heat() -> Job:
    """Cooling of a rod, 256 points inside, 96 on the border, whole set as one batch."""
    generator = torch.Generator().manual_seed(0)
    inside = torch.rand(256, 2, generator=generator)
    start = torch.stack([torch.zeros(48), torch.linspace(0, 1, 48)], 1)
    ends = torch.stack([torch.rand(48, generator=generator), (torch.arange(48) % 2).float()], 1)
    border = torch.cat([start, ends])
    weight = 10.0
    targets = torch.cat([torch.zeros(256), weight**0.5 * _rod(border)])[:, None]
    net = networks.PINN(_heat, 2, weight=weight)
    grid = torch.cartesian_prod(torch.linspace(0, 1, 20), torch.linspace(0, 1, 20))
    return Job(
        Task(net, F.mse_loss, adamw(5e-3, weight_decay=0.0), training.cosine),
        data.shuffled(data.points(inside, border, targets), len(targets)),
        1200,
        lambda module: _fit(module, grid, _rod(grid)[:, None]),
    )


def _rod(points: Tensor) -> Tensor:
    return torch.exp(-0.2 * math.pi**2 * points[:, 0]) * torch.sin(math.pi * points[:, 1])


def pinn_decay() -> Job:
    """Exponential decay from 1, by SGD with momentum."""
    inside = torch.linspace(0, 2, 64)[:, None]
    weight = 20.0
    targets = torch.cat([torch.zeros(64), torch.full((1,), weight**0.5)])[:, None]
    net = networks.PINN(_decay, 1, weight=weight)
    grid = torch.linspace(0, 2, 100)[:, None]
    return Job(
        Task(net, F.mse_loss, sgd(0.02), None),
        data.shuffled(data.points(inside, torch.zeros(1, 1), targets), len(targets)),
        1500,
        lambda module: _fit(module, grid, torch.exp(-grid)),
    )


def _friedman_net() -> nn.Module:
    return networks.mlp([10, 64, 64, 1], nn.SiLU)


def _sequence(optimize: Optimize, schedule: Schedule, **options: Any) -> Callable[[], Job]:
    return images(networks.LSTM, optimize, schedule, 64, 14, standard=True, probes=11, **options)


HEALTHY = (
    Case("cnn-bn-sgd", "CNN, BatchNorm; SGD 0.05, momentum 0.9, cosine; batch 64",
         images(lambda: networks.cnn(BatchNorm), sgd(0.05, weight_decay=5e-4), training.cosine, 64, 8),
         "accuracy", 0.95),
    Case("cnn-bn-small-batch", "CNN, BatchNorm; SGD 0.005, momentum 0.9; batch 8",
         images(lambda: networks.cnn(BatchNorm), sgd(0.005), None, 8, 4), "accuracy", 0.95),
    Case("cnn-bn-large-batch", "CNN, BatchNorm; AdamW 0.005, warm-up and cosine; batch 512",
         images(lambda: networks.cnn(BatchNorm), adamw(5e-3), training.warm_cosine, 512, 40), "accuracy", 0.95),
    Case("cnn-ln-adamw", "CNN, LayerNorm over channels, dropout; AdamW 0.001; batch 32",
         images(lambda: networks.cnn(networks.ChannelNorm, dropout=0.1), adamw(1e-3), None, 32, 10),
         "accuracy", 0.95),
    Case("cnn-gn-nesterov", "CNN, GroupNorm; SGD 0.02, Nesterov, weight decay, stairs; batch 64",
         images(lambda: networks.cnn(networks.group_norm), sgd(0.02, nesterov=True, weight_decay=5e-4),
                training.stairs, 64, 10), "accuracy", 0.95),
    Case("cnn-plain-adamw", "CNN without norms; AdamW 0.002, cosine; batch 128",
         images(lambda: networks.cnn(None), adamw(2e-3), training.cosine, 128, 20), "accuracy", 0.95),
    Case("resnet-bn-sgd", "ResNet, BatchNorm; SGD 0.1, momentum 0.9, weight decay, warm-up and cosine; batch 128",
         images(networks.resnet, sgd(0.1, weight_decay=5e-4), training.warm_cosine, 128, 14), "accuracy", 0.95),
    Case("resnet-bn-one-cycle", "ResNet, BatchNorm; AdamW, one cycle to 0.005; batch 64",
         images(networks.resnet, adamw(5e-3, weight_decay=0.01), training.one_cycle, 64, 8), "accuracy", 0.95),
    Case("resnet-gn-smoothed", "ResNet, GroupNorm, branches start at zero, label smoothing; AdamW 0.003, cosine; "
         "batch 64",
         images(lambda: networks.resnet(networks.group_norm, zero=True), adamw(3e-3, weight_decay=0.05),
                training.cosine, 64, 10, smoothing=0.1), "accuracy", 0.95),
    Case("vit-adamw", "ViT, dropout 0.1; AdamW 0.005, no decay of vectors, warm-up and cosine; batch 64",
         images(lambda: networks.ViT(dropout=0.1), training.adamw_without_decay_of_vectors(5e-3, 0.05),
                training.warm_cosine, 64, 12, probes=11, standard=True), "accuracy", 0.93),
    Case("vit-sgd", "ViT; SGD 0.1, momentum 0.9, warm-up and cosine, clipping at 1; batch 32",
         images(networks.ViT, sgd(0.1), training.warm_cosine, 32, 10, probes=11, standard=True, gradient_clip_val=1.0),
         "accuracy", 0.93),
    Case("gpt-written", "GPT on characters, tied head; AdamW 0.004, warm-up and cosine, clipping at 1; batch 32",
         gpt_written, "-bits per character", -3.75),
    Case("gpt-library", "GPT-2 of transformers, dropout; AdamW 0.004, warm-up; batch 2 x 16 accumulated",
         gpt_library, "-bits per character", -4.0),
    Case("lora-language", "LoRA of a pretrained GPT-2; AdamW 0.005, warm-up and cosine; batch 16",
         lora_language, "-bits per character", -3.5),
    Case("lora-vision", "LoRA of a pretrained ViT with a new head; AdamW 0.005, cosine; batch 32",
         lora_vision, "accuracy", 0.93),
    Case("lstm-adamw", "LSTM over rows; AdamW 0.01, cosine, clipping at 1; batch 64",
         _sequence(adamw(1e-2), training.cosine, gradient_clip_val=1.0), "accuracy", 0.93),
    Case("regression-diabetes", "MLP on the diabetes table, MSE; AdamW 0.001; batch 32",
         table(data.diabetes, lambda: networks.mlp([10, 32, 32, 1]), F.mse_loss, adamw(1e-3, weight_decay=0.1), None,
               batch=32, epochs=20), "R²", 0.25),
    Case("regression-huber", "MLP on Friedman's problem, Huber loss; SGD 0.02, momentum 0.9, cosine; batch 16",
         table(data.friedman, _friedman_net, F.huber_loss, sgd(0.02), training.cosine, batch=16, epochs=14),
         "R²", 0.85),
    Case("table-bce", "MLP on the breast cancer table, binary cross-entropy; SGD 0.05, momentum 0.9; batch 32",
         table(data.cancer, lambda: networks.mlp([30, 32, 1]), F.binary_cross_entropy_with_logits,
               sgd(0.05), None, batch=32, epochs=15), "accuracy", 0.93),
    Case("pinn-heat", "PINN, heat equation; AdamW 0.005, cosine; all points at once", pinn_heat, "1 - error", 0.95),
    Case("pinn-decay", "PINN, decay; SGD 0.02, momentum 0.9; all points at once", pinn_decay, "1 - error", 0.95),
)  # fmt: skip
