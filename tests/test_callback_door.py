"""What NTKMonitor takes and refuses before a run has begun."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ntk_monitor.callbacks import NTKMonitor
from ntk_monitor.errors import InputError


def test_lightning_cli_reads_every_option_from_yaml(tmp_path: Path) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(NTKMonitor, "monitor", fail_untyped=True)
    config = tmp_path / "config.yaml"
    config.write_text("every_n_steps: 7\noutputs: trace\nforward: torch.nn.functional.relu\nparams: [a, b]\n")
    parsed = parser.instantiate(parser.parse_args([f"--monitor={config}"]))
    assert parsed.monitor.recipe.every_n_steps == 7
    assert parsed.monitor.recipe.outputs == "trace"
    assert parsed.monitor.recipe.forward is F.relu
    assert list(parsed.monitor.recipe.params) == ["a", "b"]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every_n_steps": 0}, "every_n_steps"),
        ({"max_overhead": 0}, "max_overhead"),
        ({"outputs": "diagonal"}, "outputs"),
        ({"engine": "magic"}, "engine"),
        ({"gram_every": -1}, "gram_every"),
        ({"memory_limit": 0}, "memory_limit"),
        ({"forward": 3}, "forward"),
        ({"log_prefix": ""}, "log_prefix"),
        ({"probe": 0}, "probe"),
        ({"probe": "digits"}, "probe"),
        ({"probe": (torch.empty(0, 3), torch.empty(0))}, "at least one sample"),
        ({"probe": (torch.ones(4, 3), torch.ones(3))}, "same samples"),
        ({"loss": "focal"}, "unknown loss"),
    ],
)
def test_bad_options_are_refused_at_the_door(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        NTKMonitor(**options)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every_n_steps": "10"}, "every_n_steps must be int or None"),
        ({"memory_limit": "1GB"}, "memory_limit must be int or None"),
        ({"seed": "a"}, "seed must be int"),
        ({"log_prefix": 3}, "log_prefix must be str"),
        ({"params": "("}, "valid regular expression"),
        ({"params": 3}, "params must be"),
        ({"device": "gpu"}, "device must be a torch device"),
        ({"loss": nn.CrossEntropyLoss}, r"pass CrossEntropyLoss\(\)"),
    ],
)
def test_options_of_the_wrong_type_are_refused_at_the_door(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        NTKMonitor(**options)
