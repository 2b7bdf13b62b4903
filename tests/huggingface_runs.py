"""Short runs of the Hugging Face Trainer on models of its library, tiny and random, and what they leave behind."""

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset

from tests.training import seeded, state_hash

VOCABULARY, LENGTH, STEPS = 24, 10, 4

# Tokens of their own: the library warns about the defaults, which lie outside of so small a vocabulary.
_TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


class Sentences(Dataset[dict[str, Any]]):
    """Texts of different lengths, the first two tokens of each given rather than predicted."""

    def __init__(self, count: int = 24, *, shortest: int = 4, **more: Callable[[Tensor], Any]) -> None:
        self._count, self._shortest, self._more = count, shortest, more

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        length = int(torch.randint(self._shortest, LENGTH + 1, (), generator=generator))
        tokens = torch.randint(3, VOCABULARY, (length,), generator=generator)
        item: dict[str, Any] = {"input_ids": tokens, "labels": torch.where(torch.arange(length) < 2, -100, tokens)}
        return item | {name: make(tokens) for name, make in self._more.items()}


class Labelled(Dataset[dict[str, Any]]):
    """Texts of one length with a class each, or pictures."""

    def __init__(self, count: int = 24, *, pictures: bool = False) -> None:
        self._count, self._pictures = count, pictures

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        if self._pictures:
            return {"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": index % 3}
        return {"input_ids": torch.randint(3, VOCABULARY, (6,), generator=generator), "labels": index % 3}


def padded(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Collate as the library's collators for text do: padded at the end, -100 where there is nothing to predict."""
    longest = max(len(item["input_ids"]) for item in items)

    def rows(name: str, value: int) -> Tensor:
        return torch.stack([nn.functional.pad(i[name], (0, longest - len(i[name])), value=value) for i in items])

    mask = [torch.arange(longest) < len(item["input_ids"]) for item in items]
    return {
        "input_ids": rows("input_ids", 0),
        "labels": rows("labels", -100),
        "attention_mask": torch.stack(mask).long(),
    }


def flat(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Collate without padding: one row, the documents one behind the other."""
    collate: Any = transformers.DataCollatorWithFlattening
    found: dict[str, Any] = collate()([{k: v.tolist() for k, v in item.items()} for item in items])
    return found


def gpt2(**options: Any) -> nn.Module:
    settings: dict[str, Any] = {"n_positions": 32, "n_embd": 8, "n_layer": 2, "n_head": 2, **_TOKENS, **options}
    model: nn.Module = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings))
    return model


def llama(**options: Any) -> nn.Module:
    settings: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, **_TOKENS}
    settings |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32, **options}
    model: nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    return model


def bert(**options: Any) -> nn.Module:
    settings: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_labels": 3}
    settings |= {"num_attention_heads": 2, "max_position_embeddings": 16, "vocab_size": VOCABULARY, **options}
    model: nn.Module = transformers.BertForSequenceClassification(transformers.BertConfig(**settings))
    return model


def vit(**options: Any) -> nn.Module:
    settings: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_labels": 3}
    settings |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4, **options}
    model: nn.Module = transformers.ViTForImageClassification(transformers.ViTConfig(**settings))
    return model


def t5(**options: Any) -> nn.Module:
    settings: dict[str, Any] = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2, **options}
    settings |= {"vocab_size": VOCABULARY, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
    model: nn.Module = transformers.T5ForConditionalGeneration(transformers.T5Config(**settings))
    return model


def lora() -> nn.Module:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks for what the library will rename
        chosen = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        base: Any = gpt2()
        model: Any = peft.get_peft_model(base, chosen)
        return cast("nn.Module", model)


def trainer(
    model: nn.Module, root: Path, callbacks: list[Any], data: Any = None, *, collate: Any = padded, **options: Any
) -> Any:
    """Return a Trainer that says nothing; `kind` among the options is its class, `checkpointing` "reentrant" or not."""
    kind = options.pop("kind", transformers.Trainer)
    known = ("eval_dataset", "optimizers", "compute_loss_func", "processing_class")
    parts = {name: options.pop(name) for name in known if name in options}
    settings: dict[str, Any] = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    settings |= {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no"}
    if "checkpointing" in options:  # the library is renaming it
        new = hasattr(transformers.TrainingArguments, "activation_checkpointing")
        name = "activation_checkpointing" if new else "gradient_checkpointing"
        settings |= {name: True, f"{name}_kwargs": {"use_reentrant": options.pop("checkpointing") == "reentrant"}}
    arguments = transformers.TrainingArguments(str(root), **{**settings, **options})
    made: Any = kind(
        model,
        arguments,
        train_dataset=data or Sentences(),
        data_collator=collate,
        callbacks=callbacks,
        **parts,
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


class Losses(transformers.TrainerCallback):
    """Keeps what the Trainer logs."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.values += [logs[name] for name in ("loss", "eval_loss", "grad_norm") if name in logs]


def left_behind(run: Any, losses: list[float]) -> dict[str, str]:
    """Weights and buffers, optimizer, losses, flags, random states, configuration, what was logged."""
    model = run.model
    return {
        "weights": state_hash(model.state_dict()),
        "gradients": state_hash([p.grad for p in model.parameters()]),
        "trainable": state_hash([p.requires_grad for p in model.parameters()]),
        "optimizer": state_hash(run.optimizer.state_dict()),
        "rates": state_hash(run.lr_scheduler.get_last_lr()),
        "losses": state_hash(losses),
        "flags": state_hash([m.training for m in model.modules()]),
        "configuration": state_hash(model.config.to_dict() if hasattr(model.config, "to_dict") else {}),
        "logged": state_hash([sorted(entry) for entry in run.state.log_history]),
        "torch": state_hash(torch.get_rng_state()),
        "numpy": state_hash(np.random.get_state(legacy=False)),
        "python": state_hash(random.getstate()),
    }


def outcome(
    build: Callable[[], nn.Module], root: Path, callbacks: list[Any], data: Any = None, **options: Any
) -> dict[str, str]:
    """Train from the same start, or from a checkpoint (`resume`), and return what is left behind."""
    seeded()
    losses, resume = Losses(), options.pop("resume", None)
    run = trainer(build(), root, [losses, *callbacks], data, **options)
    run.train(resume_from_checkpoint=resume)
    return left_behind(run, losses.values)
