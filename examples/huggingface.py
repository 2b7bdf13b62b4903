"""A language model in the Hugging Face Trainer: one callback, and the kernel of whole sequences.

You learn what a language model gets without any option: the loss that its own forward computes, recognised; one row of
the kernel per sequence; the record in the Trainer's TensorBoard log. Needs the extra `huggingface`.
Run it with `python examples/huggingface.py`; then `tensorboard --logdir runs/huggingface`.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import Dataset

import ntk_monitor as ntk
from ntk_monitor.callbacks import NTKMonitorCallback

TEXT = Path(__file__).read_text() * 4  # a program that reads itself
LENGTH = 32


class Windows(Dataset[dict[str, torch.Tensor]]):
    """All windows of the text, character by character."""

    def __init__(self) -> None:
        self.characters = sorted(set(TEXT))
        self.tokens = torch.tensor([self.characters.index(character) for character in TEXT])

    def __len__(self) -> int:
        return len(self.tokens) - LENGTH

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self.tokens[index : index + LENGTH]
        return {"input_ids": window, "labels": window, "attention_mask": torch.ones_like(window)}


def main(steps: int = 120, out: str | Path = "runs/huggingface") -> ntk.History:
    transformers.set_seed(0)
    data = Windows()
    ends: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    shape: dict[str, Any] = {"n_positions": LENGTH, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=len(data.characters), **shape, **ends))
    arguments = transformers.TrainingArguments(
        str(out),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        logging_steps=50,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=["tensorboard"],
    )
    monitor = NTKMonitorCallback(probe=16, every_n_steps=max(1, steps // 3), forecast_every=0)
    transformers.Trainer(model, arguments, train_dataset=data, callbacks=[monitor]).train()

    folders = sorted((Path(out) / "runs").iterdir(), key=lambda folder: folder.stat().st_mtime)
    history = ntk.load_history(folders[-1])
    for snapshot in history:
        print(
            f"step {snapshot.step:4d}  loss {snapshot.loss_value:.3f} ({snapshot.loss}, {snapshot.loss_status})  "
            f"effective rank {snapshot.metrics['effective_rank']:.1f} of {snapshot.samples} sequences"
        )
    print("layers that move the outputs:", dict(zip(snapshot.layers, snapshot.layer_update.round(2), strict=True)))
    return history


if __name__ == "__main__":
    main()
