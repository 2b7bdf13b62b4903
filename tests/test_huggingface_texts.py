"""Samples of a Hugging Face run as texts: decoded by whatever the run decodes with, and nothing where it cannot."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

import ntk_monitor as ntk
from ntk_monitor.callbacks import NTKMonitorCallback
from ntk_monitor.callbacks.huggingface_texts import MOST, texts_of, tokenizer_of
from tests.huggingface_runs import VOCABULARY, Labelled, bert, outcome


def words() -> PreTrainedTokenizerFast:
    core = Tokenizer(WordLevel({"[pad]": 0} | {f"w{i}": i for i in range(1, VOCABULARY)}, unk_token="w1"))
    core.pre_tokenizer = WhitespaceSplit()
    build: Any = PreTrainedTokenizerFast
    made: PreTrainedTokenizerFast = build(tokenizer_object=core, pad_token="[pad]", unk_token="w1", eos_token="w2")
    return made


class Letters:
    """Decodes to one character each, lines included."""

    def decode(self, tokens: list[int], **_: Any) -> str:
        return "".join("abc\n"[token] for token in tokens)


def test_padding_is_left_out_on_either_side() -> None:
    ids = torch.tensor([[5, 6, 7, 0], [0, 0, 8, 9]])
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])
    assert texts_of({"input_ids": ids, "attention_mask": mask}, words()) == ("w5 w6 w7", "w8 w9")
    assert texts_of({"input_ids": ids}, words()) == ("w5 w6 w7", "w8 w9")  # special tokens say nothing


def test_texts_are_short_lines() -> None:
    ids = torch.tensor([[0, 3, 3, 1], [2, 3, 2, 0]])
    assert texts_of({"input_ids": ids}, Letters()) == ("a b", "c ca")
    (long,) = texts_of({"input_ids": torch.zeros(1, 5000, dtype=torch.long)}, Letters())
    assert long == "a" * (MOST - 1) + "…"


class Broken:
    def decode(self, tokens: list[int], **_: Any) -> str:
        raise ValueError("no such token")


@pytest.mark.parametrize(
    ("inputs", "tokenizer"),
    [
        ({"input_ids": torch.ones(2, 3)}, None),
        ({"input_ids": torch.ones(2, 3).long()}, Broken()),
        ({"pixel_values": torch.ones(2, 3, 8, 8)}, Letters()),
        ({"input_ids": torch.ones(2, 3, 4).long()}, Letters()),
        (torch.ones(2, 3).long(), Letters()),
    ],
)
def test_where_nothing_decodes_there_are_no_texts(inputs: Any, tokenizer: Any) -> None:
    assert texts_of(inputs, tokenizer) == ()


def test_the_tokenizer_is_found_where_a_run_keeps_it() -> None:
    letters = Letters()
    inside = SimpleNamespace(tokenizer=letters)
    for known in (
        {"processing_class": letters},
        {"processing_class": inside},  # a processor
        {"tokenizer": letters},
        {"processing_class": None, "train_dataloader": SimpleNamespace(collate_fn=inside)},
        {"train_dataloader": SimpleNamespace(collate_fn=SimpleNamespace(data_collator=inside))},
    ):
        assert tokenizer_of(known) is letters
    for unknown in ({}, {"processing_class": SimpleNamespace(pad=1)}, {"train_dataloader": [1]}):
        assert tokenizer_of(unknown) is None


def test_a_run_records_its_texts_and_ends_where_it_would(tmp_path: Path) -> None:
    options: dict[str, Any] = {"data": Labelled(), "collate": None, "processing_class": words()}
    callback = NTKMonitorCallback(probe=8, every_n_steps=2, strict=True, log_dir=str(tmp_path / "record"))
    seen = outcome(bert, tmp_path / "seen", [callback], **options)
    assert seen == outcome(bert, tmp_path / "plain", [], **options)
    first, second, *_ = ntk.load_history(tmp_path / "record").measured
    assert callback.monitor is not None
    ids = callback.monitor.probe.inputs["input_ids"].tolist()
    assert first.sample_texts == tuple(" ".join(f"w{token}" for token in row) for row in ids)
    assert second.sample_texts == ()
    assert (first.thumbnails.size, first.mode_samples.shape) == (0, (16, 8))
