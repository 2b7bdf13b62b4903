"""Two processes: the monitor neither hangs the run nor changes it, and one of them writes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ntk_monitor as ntk

PROGRAM = """
import sys, warnings
warnings.simplefilter("ignore")
import lightning.pytorch as L
from lightning.pytorch.loggers import TensorBoardLogger
from ntk_monitor.callbacks import NTKMonitor
from tests.modules import Classifier, cnn, digits, loader
from tests.training import seeded, state_hash
root, watched = sys.argv[1], sys.argv[2] == "watched"
seeded()
module = Classifier(cnn())
trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_steps=8, logger=TensorBoardLogger(root),
                    callbacks=[NTKMonitor(probe=12, every_n_steps=4)] if watched else [], enable_checkpointing=False,
                    enable_progress_bar=False, enable_model_summary=False)
trainer.fit(module, loader(digits()))
if trainer.is_global_zero:
    print("HASH", state_hash(module.state_dict()))
"""


@pytest.mark.slow
def test_ddp_is_neither_hung_nor_changed(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    hashes = []
    for name in ("plain", "watched"):
        done = subprocess.run(
            [sys.executable, program, str(tmp_path / name), name],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env=environment,
        )
        found = [line for line in done.stdout.splitlines() if line.startswith("HASH")]
        assert found, done.stderr[-2000:]
        hashes.append(found[0])
    assert hashes[0] == hashes[1]
    files = list((tmp_path / "watched").rglob("*tfevents*"))
    assert len(files) == 1
    assert list(ntk.load_history(files[0].parent).steps) == [0, 4, 8]
