"""How much faster two processes analyse a run than one, by the command line's own division of the work.

`python -m tests.benchmarks.analyze [--checkpoints 16] [--processes 2] [--width 256] [--repeats 3]`

Each process is a real one with a single thread, joined by gloo; all import and build everything, meet at a barrier, and
measure from there until the last has finished. Printed: seconds of one process and of several, their ratio, and whether
both histories are equal to the last bit. Exit code 1: the ratio is below 0.8 times the number of processes, or a bit
differs.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ntk_monitor as ntk
from ntk_monitor.cli import _parser, _taken
from ntk_monitor.cli.analyze import lookout, prepared, requested, share
from tests.analyses import differences
from tests.launch import ROOT, environment
from tests.modules import digits
from tests.training import seeded

GOAL = 0.8
"""Speed-up for each process, at least: 1.6 for two."""


def network(width: int = 256) -> nn.Module:
    """Return the network whose checkpoints are analysed; named on the command line of every process."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10))


def trained(root: Path, count: int, width: int) -> None:
    """Train on the digits and write so many checkpoints."""
    seeded()
    net = network(width)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    x, y = digits(512).tensors
    root.mkdir()
    for step in range(count):
        content = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "step": 5 * step}
        torch.save(content, root / f"{step}.pt")
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()


def data() -> Any:
    """Return what the probe is drawn from."""
    return digits(512)


def meet() -> None:
    """Wait for all processes."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def worker(rank: int, world: int, words: Sequence[str]) -> float:
    """Do the share of one process and return its seconds, start-up left out."""
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    kept, taken = _taken(["analyze", *words])
    options = {**_parser().parse_args(kept).analyze, **taken}
    request = requested(options)
    analysis = prepared(request, lookout(options, request).look(), Path(options["out"]))
    mine = share(analysis.pending(), rank, world)
    meet()
    start = time.perf_counter()
    analysis.run(mine, publish=False)
    meet()
    seconds = time.perf_counter() - start
    if rank == 0:
        analysis.publish()
    if world > 1:
        torch.distributed.destroy_process_group()
    return seconds


def timed(world: int, words: Sequence[str]) -> float:
    """Return the seconds of so many processes."""
    command = [sys.executable, "-m", "tests.benchmarks.analyze", "--worker"]
    known = environment() | {"OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([*command, f"{rank},{world}", *words], cwd=ROOT, env=known, stdout=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    said = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError(f"{world} processes ended with {[process.returncode for process in running]}")
    return max(float(text.split()[-1]) for text in said)


def compared(checkpoints: int, processes: int, width: int, repeats: int) -> tuple[list[float], list[float], list[str]]:
    """Return the seconds of one process and of several, by turns, and what differs between their histories."""
    one, several, wrong = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        trained(root / "run", checkpoints, width)
        model = f"tests.benchmarks.analyze:network --model.width {width} --data tests.benchmarks.analyze:data".split()
        words = [str(root / "run"), "--model", *model, "--loss", "cross_entropy", "--probe", "32"]
        for turn in range(repeats):
            outs = [root / f"{turn}-{world}" for world in (1, processes)]
            one.append(timed(1, [*words, "--out", str(outs[0])]))
            several.append(timed(processes, [*words, "--out", str(outs[1])]))
            wrong += differences(*(ntk.load_history(out) for out in outs))
    return one, several, wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 when it is too slow or a bit differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.analyze", description=__doc__)
    parser.add_argument("--checkpoints", type=int, default=16)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args(argv)
    one, several, wrong = compared(asked.checkpoints, asked.processes, asked.width, asked.repeats)
    ratios = [a / b for a, b in zip(one, several, strict=True)]
    ratio, goal = statistics.median(ratios), GOAL * asked.processes
    sys.stdout.write(
        f"{asked.checkpoints} checkpoints: {statistics.median(one):.1f} s in one process, "
        f"{statistics.median(several):.1f} s in {asked.processes}: {ratio:.2f} times the speed "
        f"({min(ratios):.2f} to {max(ratios):.2f}; wanted {goal:.1f})\n"
        f"histories: {'the same bits' if not wrong else '; '.join(wrong[:5])}\n"
    )
    return int(bool(wrong) or ratio < goal)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        place, total = map(int, sys.argv[2].split(","))
        sys.stdout.write(f"{worker(place, total, sys.argv[3:])}\n")
    else:
        raise SystemExit(main())
