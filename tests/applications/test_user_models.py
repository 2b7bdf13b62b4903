"""`ntk-monitor app NAME` on models that users have: a Lightning checkpoint of a CNN, and transformers from a config.

The table says for each what comes back: a report with verdicts, or one sentence and exit code 2, and why.
"""

from pathlib import Path

import pytest
import torch

from ntk_monitor.applications import APPLICATIONS, Report
from ntk_monitor.cli import main

KINDS = ("cnn", "bert", "vit")
"""Digits under Lightning (images, GroupNorm, dropout 0.1); token ids in a dict; images as pixel_values, no dropout."""

TOKENS = {
    "activations": "one floating tensor",
    "geometry": "one floating tensor",
    "saliency": "one floating tensor",
    "neural_ode": "a floating tensor",
}
"""Token ids cannot be scaled, have no distances and no gradient."""

SUPERVISED = {"pinn_balance": "terms of the loss by name"}
"""A supervised model has one term."""

SHAPES = {"neural_ode": "keeps the shape of its states"}
"""Classifiers are no vector fields."""

REFUSED = {
    "cnn": {**SUPERVISED, **SHAPES, "residual": "no residual connection"},
    "bert": {**SUPERVISED, **TOKENS},
    "vit": {**SUPERVISED, **SHAPES, "dropout": "no dropout module with p > 0"},
}
"""Application → part of the sentence; every other one answers."""

FEWER = {
    "kernel_regression": "steps=30",
    "early_stopping": "steps=30",
    "learning_speed": "steps=20",
    "initialization": "count=2 processes=1",
    "dropout": "draws=8",
    "geometry": "mantel=9",
    "task_overlap": "steps=2 per_task=3",
    "saliency": "resamples=20",
    "lazy_or_rich": "steps=30 scales=(0.3,1.0)",
    "class_interference": "per_class=3",
    "generalization": "steps=30",
}

QUICK = {
    ("early_stopping", "cnn"),
    ("task_overlap", "bert"),
    ("geometry", "vit"),
    ("activations", "bert"),
    ("neural_ode", "cnn"),
}


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    import lightning.pytorch as pl

    from ntk_monitor.cli.digits import Digits, loaders

    folder = tmp_path_factory.mktemp("cnn")
    pl.seed_everything(0)
    train, held_out = loaders(0)
    trainer = pl.Trainer(
        max_steps=5,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(Digits(), train, held_out)
    trainer.save_checkpoint(folder / "last.ckpt")
    torch.save(next(iter(train)), folder / "data.pt")
    words = ["--model", "ntk_monitor.cli.digits.Digits", "--checkpoint", str(folder / "last.ckpt")]
    return [*words, "--data", str(folder / "data.pt")]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=32, max_position_embeddings=16, num_labels=3, **small)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    ids = torch.randint(0, 32, (48, 8))
    torch.save({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 3}, folder / "data.pt")
    return ["--checkpoint", str(folder), "--data", str(folder / "data.pt")]


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    transformers = pytest.importorskip("transformers")
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=10, **small)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    digits = load_digits()
    images = torch.tensor(digits.images[:48], dtype=torch.float32).unsqueeze(1) / 16
    torch.save({"pixel_values": images, "labels": torch.tensor(digits.target[:48])}, folder / "data.pt")
    return ["--checkpoint", str(folder), "--data", str(folder / "data.pt")]


def parameters() -> list[object]:
    return [
        pytest.param(name, kind, id=f"{name}-{kind}", marks=() if (name, kind) in QUICK else (pytest.mark.slow,))
        for name in APPLICATIONS
        for kind in KINDS
    ]


@pytest.mark.parametrize(("name", "kind"), parameters())
def test_answers_or_says_in_one_sentence_why_not(
    name: str, kind: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["app", name, *request.getfixturevalue(kind), "--probe", "16", "--out", str(tmp_path / "out")]
    if name in FEWER:
        words += ["--set", *FEWER[name].split()]
    capsys.readouterr()
    code, said = main(words), capsys.readouterr()
    if name in REFUSED[kind]:
        assert code == 2
        assert REFUSED[kind][name] in said.err
        assert said.err.count("\n") == 1
        assert not (tmp_path / "out").exists()
        return
    assert code == 0, said.err
    report = Report.from_json((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report.name == name
    assert report.verdicts
    assert report.text() in said.out or report.title in said.out
    for figure in report.figures:
        assert (tmp_path / "out" / f"{figure}.png").is_file()


def test_weights_that_transformers_renames_are_those_that_it_would_load(vit: list[str]) -> None:
    transformers = pytest.importorskip("transformers")
    from ntk_monitor import weights
    from ntk_monitor.reading import read

    folder = Path(vit[1])
    model = transformers.ViTForImageClassification(transformers.ViTConfig.from_pretrained(folder))
    weights.apply(model, weights.chosen(read(folder)))
    wanted = transformers.ViTForImageClassification.from_pretrained(folder).state_dict()
    found = model.state_dict()
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
