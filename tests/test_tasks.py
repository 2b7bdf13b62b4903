"""The README's table "what happens with my task", one run per line: supported, reduced or refused, as it says there."""

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import ntk_monitor as ntk
from ntk_monitor.callbacks import NTKMonitor
from ntk_monitor.say import NTKWarning
from tests.modules import Classifier, digits, loader, mlp
from tests.training import seeded, trainer

README = Path(__file__).parent.parent / "README.md"


def run(root: Path, module: L.LightningModule, data: Any, **options: Any) -> ntk.History:
    """Train six steps under a monitor and return what it left behind."""
    seeded()
    monitor = NTKMonitor(**{"every_n_steps": 3, **options})
    fitted = trainer(root, [monitor], max_steps=6, max_epochs=-1, logger=TensorBoardLogger(root))
    fitted.fit(module, data)
    assert fitted.global_step >= 6
    return ntk.load_history(root / "lightning_logs" / "version_0")


class Task(L.LightningModule):
    """A network and a loss (outputs, targets) → scalar."""

    def __init__(self, net: nn.Module, loss: Any) -> None:
        super().__init__()
        self.net, self.compute = net, loss

    def forward(self, x: Any) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.compute(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def verdict(task: str) -> str:
    """The second column of the README's table."""
    row = re.search(rf"^\| {re.escape(task)}[^|]*\| ([a-z]+)", README.read_text(), re.MULTILINE)
    assert row, f"README has no line for {task}"
    return row.group(1)


def judged(history: ntk.History) -> str:
    """Supported: spectrum and modes. Reduced: spectrum without modes. Refused: nothing but the reason."""
    if not history.measured:
        return "refused"
    return "supported" if history.measured[-1].rates.size else "reduced"


def test_classification(tmp_path: Path) -> None:
    assert judged(run(tmp_path, Classifier(mlp()), loader(digits()))) == verdict("classification") == "supported"


def test_multi_label(tmp_path: Path) -> None:
    data = TensorDataset(torch.randn(96, 6), (torch.rand(96, 4) < 0.3).float())
    task = Task(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), F.binary_cross_entropy_with_logits)
    found = run(tmp_path, task, loader(data))
    assert found[-1].loss == "bce_with_logits(mean)"
    assert judged(found) == verdict("multi-label") == "supported"


def test_regression(tmp_path: Path) -> None:
    data = TensorDataset(torch.randn(96, 6), torch.randn(96, 2))
    found = run(tmp_path, Task(nn.Linear(6, 2), F.mse_loss), loader(data))
    assert judged(found) == verdict("regression") == "supported"


def test_dense_outputs(tmp_path: Path) -> None:
    data = TensorDataset(torch.randn(64, 1, 8, 8), torch.randint(0, 3, (64, 8, 8)))
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))
    found = run(tmp_path, Task(net, F.cross_entropy), loader(data))
    assert found[-1].kernel == "loss"
    assert found[-1].loss_status == "matched"
    assert judged(found) == verdict("dense outputs") == "reduced"


class TinyLanguageModel(nn.Module):
    """Causal self-attention over 8 tokens, input and output embeddings tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = nn.LayerNorm(16)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        x = self.norm(x + self.attend(x, x, x, attn_mask=mask, need_weights=False)[0])
        logits: Tensor = x @ self.embed.weight.T
        return logits


def test_language_model(tmp_path: Path) -> None:
    tokens = torch.randint(0, 50, (64, 9))
    task = Task(TinyLanguageModel(), lambda f, y: F.cross_entropy(f.flatten(0, 1), y.flatten()))
    found = run(tmp_path, task, loader(TensorDataset(tokens[:, :-1], tokens[:, 1:])))
    assert found[-1].loss == "token_cross_entropy(mean)"
    assert found[-1].kernel == "loss"
    assert judged(found) == verdict("language models") == "reduced"


def test_contrastive(tmp_path: Path) -> None:
    def info_nce(f: Tensor, view: Tensor) -> Tensor:
        z, other = F.normalize(f, dim=1), F.normalize(view[:, :4], dim=1)
        return F.cross_entropy(z @ other.T / 0.1, torch.arange(len(z)))

    data = TensorDataset(torch.randn(64, 6), torch.randn(64, 6))
    found = run(tmp_path, Task(nn.Linear(6, 4), info_nce), loader(data))
    assert found[-1].loss_status.startswith("not verified")
    assert judged(found) == verdict("contrastive") == "reduced"


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.body(x))
        return {"class": self.a(h), "value": self.b(h)}


class MultiTask(Task):
    def __init__(self) -> None:
        super().__init__(TwoHeads(), None)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        found = self(batch[0])
        return F.cross_entropy(found["class"], batch[1]) + found["value"].square().mean()


def test_multi_task_without_forward_is_refused(tmp_path: Path) -> None:
    data = loader(TensorDataset(torch.randn(64, 6), torch.randint(0, 3, (64,))))
    seeded()
    fitted = trainer(tmp_path, [NTKMonitor(every_n_steps=3)], max_steps=6, max_epochs=-1)
    with pytest.warns(NTKWarning, match=r"several floating tensors \['class', 'value'\].*pass forward="):
        fitted.fit(MultiTask(), data)
    assert fitted.global_step == 6
    assert verdict("multi-task") == "refused"


def class_head(module: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = module(x)["class"]
    return y


def test_multi_task_head_by_head_is_supported(tmp_path: Path) -> None:
    data = loader(TensorDataset(torch.randn(64, 6), torch.randint(0, 3, (64,))))
    found = run(tmp_path, MultiTask(), data, forward=class_head, loss="cross_entropy")
    assert judged(found) == "supported"


class GAN(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        self.critic = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()  # type: ignore[attr-defined]
        fake = self.generator(torch.randn(len(batch[0]), 4))
        for optimizer, loss in (
            (first, -self.critic(fake).mean()),
            (second, self.critic(fake.detach()).mean() - self.critic(batch[0]).mean()),
        ):
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.generator.parameters(), 0.01), torch.optim.SGD(self.critic.parameters(), 0.01)


def critic(module: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = module.critic(x)  # type: ignore[operator]
    return y


def test_gan(tmp_path: Path) -> None:
    data = loader(TensorDataset(torch.randn(64, 2), torch.zeros(64)))
    found = run(tmp_path, GAN(), data, forward=critic, params="^critic")
    assert judged(found) == verdict("GAN") == "reduced"


class Replay(Dataset[tuple[Tensor, Tensor, Tensor]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        return torch.full((4,), i / 64), torch.tensor(i % 2), torch.tensor(float(i))


class Policy(Task):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        states, actions, returns = batch
        return -(F.log_softmax(self(states), 1).gather(1, actions[:, None])[:, 0] * returns).mean()


def test_reinforcement_learning(tmp_path: Path) -> None:
    states = torch.randn(32, 4)
    found = run(tmp_path, Policy(nn.Linear(4, 2), None), DataLoader(Replay(), 16), probe=states)
    assert judged(found) == verdict("reinforcement learning") == "reduced"
