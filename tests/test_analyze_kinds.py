"""Analyze on what other libraries leave on disk: LightningCLI, Hugging Face's Trainer, torch.distributed.checkpoint."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.cli import LightningCLI

import ntk_monitor as ntk
from ntk_monitor.cli import main
from tests import analyses
from tests.launch import environment
from tests.training import seeded

CONFIG = """
seed_everything: 3
model:
  class_path: tests.analyses.Net
  init_args: {{width: 5}}
data:
  class_path: tests.analyses.Data
  init_args: {{batch: 16}}
trainer:
  max_steps: 4
  gradient_clip_val: 0.5
  accelerator: cpu
  logger:
    class_path: lightning.pytorch.loggers.CSVLogger
    init_args: {{save_dir: {root}}}
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{every_n_train_steps: 2, save_top_k: -1, save_last: true}}
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jsonargparse, about what Lightning asks of it
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_of_lightning_cli_needs_its_directory_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.yaml").write_text(CONFIG.format(root=tmp_path))
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", f"--config={tmp_path / 'train.yaml'}"])
    cli = LightningCLI(save_config_kwargs={"overwrite": True})
    run = tmp_path / "lightning_logs" / "version_0"
    assert (run / "config.yaml").is_file()
    words = ["--loss", "cross_entropy", "--probe", "8", "--reference", "0", "--no-report"]
    assert main(["analyze", str(run), *words]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "version_0/config.yaml says" in said
    assert "last.ckpt holds the same weights" in said
    found = ntk.load_history(run / "ntk_analysis")
    assert [s.step for s in found] == [2, 4]
    for snapshot in found:
        assert snapshot.parameters == sum(p.numel() for p in cli.model.parameters())
        assert snapshot.facts["batch_size"] == 16
        assert snapshot.facts["total_steps"] == 4
        assert "lr_headroom_high" in snapshot.metrics
    probe = ntk.Probe.of(analyses.data(), 8)
    assert found[-1].probe == probe.hash
    wanted = ntk.empirical_ntk(cli.model, probe.inputs).reshape(24, 24).double().numpy()
    np.testing.assert_allclose(found[-1].eigenvalues, np.linalg.eigvalsh(wanted)[::-1], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_hugging_face_run_needs_its_directory_and_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    seeded()
    config = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    ids = torch.randint(0, 11, (12, 6))
    rows: Any = [{"input_ids": row, "labels": row} for row in ids]
    options: dict[str, Any] = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "learning_rate": 0.01}
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=4, save_steps=2, per_device_train_batch_size=2, **options
    )
    Trainer(GPT2LMHeadModel(config), arguments, train_dataset=rows).train()
    torch.save({"input_ids": ids[:6], "labels": ids[:6]}, tmp_path / "samples.pt")
    words = ["--data", str(tmp_path / "samples.pt"), "--loss", LOSS, "--outputs", "loss"]
    assert main(["analyze", str(tmp_path / "run"), *words, "--reference", "0", "--no-report"]) == 0
    assert "GPT2LMHeadModel as config.json says" in " ".join(capsys.readouterr().out.split())
    found = ntk.load_history(tmp_path / "run" / "ntk_analysis")
    assert [(s.step, s.status, s.kernel, s.samples) for s in found] == [
        (2, "measured", "loss", 6),
        (4, "measured", "loss", 6),
    ]
    assert {s.facts["total_steps"] for s in found} == {4}
    assert found[-1].texts["optimizer"].startswith("AdamW")
    # The twin: gradients of the mean token loss of each sequence, one by one.
    model: Any = GPT2LMHeadModel.from_pretrained(tmp_path / "run" / "checkpoint-4")
    model.eval()
    gradients = []
    for row in ids[:6, None]:
        model.zero_grad()
        model(input_ids=row, labels=row).loss.backward()
        gradients.append(torch.cat([p.grad.flatten().double() for p in model.parameters()]))
    jacobian = torch.stack(gradients)
    wanted = np.linalg.eigvalsh((jacobian @ jacobian.T).numpy())[::-1]
    np.testing.assert_allclose(found[-1].eigenvalues, wanted, rtol=1e-3, atol=1e-6)


LOSS = "token_cross_entropy(mean, shifted)"

SHARDED = """
import sys
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import fully_shard
from tests import analyses
from tests.training import seeded

rank, root = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{root}/rendezvous", rank=rank, world_size=2)
seeded()
net = analyses.network()
torch.save(net.state_dict(), f"{root}/plain-step=3.pt") if rank == 0 else None
fully_shard(net, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (2,)))
dcp.save({"model": net.state_dict(), "step": 3}, checkpoint_id=f"{root}/sharded")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_shards_of_two_processes_are_put_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    running = [
        subprocess.Popen([sys.executable, "-c", SHARDED, str(rank), str(tmp_path)], env=environment())
        for rank in (0, 1)
    ]
    assert [process.wait(300) for process in running] == [0, 0]
    assert len(list((tmp_path / "sharded").glob("*.distcp"))) == 2
    words = ["--model", "tests.analyses:network", "--data", analyses.DATA, "--probe", "8", "--no-report"]
    assert main(["analyze", str(tmp_path / "sharded"), *words]) == 2
    assert "--trust-checkpoint" in capsys.readouterr().err
    assert main(["analyze", str(tmp_path / "sharded"), *words, "--trust-checkpoint", "--out", str(tmp_path / "a")]) == 0
    assert main(["analyze", str(tmp_path / "plain-step=3.pt"), *words, "--out", str(tmp_path / "b")]) == 0
    assert analyses.differences(ntk.load_history(tmp_path / "a"), ntk.load_history(tmp_path / "b")) == []
