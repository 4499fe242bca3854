"""Healing by several processes: they learn what one does, go on where another number stopped, and
speak with one voice.
"""

import json
import os
import subprocess
import sys

import pytest
from conftest import SETTINGS, log, losses, run
from encoder_decoders import build

from lrkv_convert import convert


def launched(processes: int, *command) -> subprocess.CompletedProcess:
    """A command under `accelerate launch`. --multi_gpu: several processes, whatever they run on;
    without it and without MPI, accelerate launches one on a CPU.
    """
    several = ["--multi_gpu"] if processes > 1 else []
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            *several,
            "--num_processes",
            str(processes),
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "-m",
            "lrkv_cli.main",
            *map(str, command),
            "--device",
            "cpu",
        ],
        capture_output=True,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
        timeout=300,
    )


def stopped(monkeypatch, after: int, *command) -> None:
    """Run a command that is interrupted after so many steps."""
    from lrkv_convert.train import loop

    step = loop.Trainer.step
    with monkeypatch.context() as patch:
        patch.setattr(
            loop.Trainer,
            "step",
            lambda self, n, run, stop: (step(self, n, run, stop)[0], n + 1 == after),
        )
        assert (
            run(*command, code=130)
            .stderr.strip()
            .endswith("the same command with --resume goes on from there")
        )


@pytest.mark.slow
def test_two_processes_learn_what_one_does(converted, sheep, tmp_path):
    command = ["heal", str(converted()), "--data", str(sheep), "--set", *SETTINGS]
    run(*command, "--out", tmp_path / "one")
    done = launched(2, *command, "--out", tmp_path / "two", "--json")
    assert done.returncode == 0, done.stderr
    entry = json.loads(done.stdout)  # the main process speaks alone
    assert entry["processes"] == 2 and (tmp_path / "two" / "model.safetensors").is_file()
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    checks = [
        [line["validation_nll"] for line in log(tmp_path / name) if "validation_nll" in line]
        for name in ("one", "two")
    ]
    assert checks[0] == pytest.approx(checks[1], rel=1e-4) and len(checks[0]) == 3


@pytest.mark.slow
def test_two_processes_learn_what_one_does_of_an_encoder_decoder(tmp_path):
    """Examples of a step that predict different numbers of tokens weigh as many."""
    convert(str(build("t5", tmp_path / "t5")), tmp_path / "lrkv", rank=7, calibration=[])
    rows = [{"source": "sheep " * (2 + i % 5), "target": f"{i} " * (1 + i % 7)} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["heal", str(tmp_path / "lrkv"), "--data", str(tmp_path / "pairs.jsonl"), "--set"]
    command += [*SETTINGS, "tokens=300", "validation_tokens=30"]
    run(*command, "--out", tmp_path / "one")
    done = launched(2, *command, "--out", tmp_path / "two", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["processes"] == 2
    for name in ("loss", "grad_norm", "validation_nll"):
        found = [[x[name] for x in log(tmp_path / out) if name in x] for out in ("one", "two")]
        assert found[0] == pytest.approx(found[1], rel=1e-3) and len(found[0]) > 2


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(converted, sheep, tmp_path, monkeypatch):
    command = ["heal", converted(), "--data", sheep, "--set", *SETTINGS]
    run(*command, "--out", tmp_path / "one")
    stopped(monkeypatch, 3, *command, "--out", tmp_path / "two")
    done = launched(2, *command, "--out", tmp_path / "two", "--resume")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


@pytest.mark.slow
def test_a_refusal_is_said_once_by_many(converted, sheep, tmp_path):
    done = launched(
        2,
        "heal",
        converted(),
        "--data",
        sheep,
        "--set",
        *SETTINGS,
        "batch_size=5",
        "--out",
        tmp_path / "out",
    )
    assert (
        done.returncode == 1
        and done.stderr.count("error: a batch of 5 windows does not divide among 2 processes") == 1
    )
    assert not list(tmp_path.iterdir())


SHARDED = """
import copy, torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_optimizer_state_dict,
    set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from lrkv_convert.train.optimise import MuonAdamW
from lrkv_convert.train.options import Options

torch.set_num_threads(1)
dist.init_process_group("gloo")

def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Linear(10, 4))

def optimiser(m):
    named = dict(m.named_parameters())
    return MuonAdamW({"muon": {n: p for n, p in named.items() if p.ndim == 2},
        "adamw": {n: p for n, p in named.items() if p.ndim == 1}}, Options(muon_lr=0.01,
        adamw_lr=0.01))

def descend(m, o, steps, x=torch.randn(32, 6, generator=torch.Generator().manual_seed(1))):
    for _ in range(steps):
        m(x).square().sum().backward()
        o.step()
        o.zero_grad()

whole, sharded = model(), model()
fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
a, b = optimiser(whole), optimiser(sharded)
descend(whole, a, 3)
descend(sharded, b, 3)
kept = copy.deepcopy(get_optimizer_state_dict(sharded, b,
    options=StateDictOptions(full_state_dict=True)))
weights = {n: p.full_tensor().clone() for n, p in sharded.named_parameters()}
descend(sharded, b, 2)
again = model()
again.load_state_dict(weights) if dist.get_rank() == 0 or True else None
fully_shard(again, mesh=init_device_mesh("cpu", (2,)))
c = optimiser(again)
set_optimizer_state_dict(again, c, kept, options=StateDictOptions(full_state_dict=True))
descend(again, c, 2)
descend(whole, a, 2)
for (n, p), q, r in zip(sharded.named_parameters(), again.parameters(), whole.parameters()):
    assert torch.allclose(p.full_tensor(), q.full_tensor(), atol=1e-6), n
    # Muon's bfloat16 iteration magnifies rounding
    assert (p.full_tensor() - r).norm() < 0.02 * r.norm(), (n,
        (p.full_tensor() - r).norm() / r.norm())
print("equal")
"""


@pytest.mark.slow
def test_sharded_weights_learn_what_whole_ones_do_and_their_optimiser_is_restored(tmp_path):
    """FSDP2, as accelerate shards with fsdp.yaml; accelerate itself shards on GPUs only."""
    (tmp_path / "sharded.py").write_text(SHARDED)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            "--master_port",
            "29731",
            str(tmp_path / "sharded.py"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and done.stdout.count("equal") == 2, done.stderr
