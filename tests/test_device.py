"""Every step of a conversion works on the device it was given: on a pretended GPU, which refuses to
mix devices.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import prompt, relative
from encoder_decoders import PAIRS, load, logits, target
from encoder_decoders import build as build_encoder_decoder

from lrkv_convert import convert

JOBS = {  # name: (family, options)
    "budget": ("llama", {"cache_ratio": 0.6, "bits": "16"}),
    "codes": ("llama", {"cache_ratio": 0.2}),
    "codes of the same width": ("gpt2", {"rank": 7, "bits": "8"}),
    "rotary keys": ("llama-bias", {"cache_ratio": 0.75, "keys": "rotary"}),
    "aligned": ("llama", {"rank": 7, "base": "aligned"}),
    "grouped": ("llama", {"rank": 0, "base_width": 36, "base": "grouped"}),
    "fused": ("gpt2", {"rank": 7}),
    "soft cap": ("gemma2", {"cache_ratio": 0.6, "bits": "16"}),
    "neighbouring channels": ("gptj", {"rank": 7, "metric": "attention"}),
    "experts": ("mixtral", {"rank": 7}),
    "relative bias": ("t5", {"rank": 7, "attention": "self,cross"}),
}


def test_the_pretence_refuses_to_mix_devices():
    says = subprocess.run(
        [
            sys.executable,
            "-c",
            """
import torch, pretended_gpu
pretended_gpu.pretend()
with pretended_gpu.Pretended():
    there = torch.ones(3, 3, device=pretended_gpu.GPU)
    assert (there @ there.to("cpu").to(pretended_gpu.GPU)).device == pretended_gpu.GPU and (
        there @ there)[0, 0].item() == 3
    there @ torch.ones(3, 3)
""",
        ],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    ).stderr
    assert "aten.mm.default mixes devices" in says, says


@pytest.mark.slow
def test_a_conversion_on_a_device_is_that_on_the_cpu(tiny, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    jobs = []
    for name, (family, options) in JOBS.items():
        source = build_encoder_decoder(family, tmp_path / "t5") if family == "t5" else tiny(family)
        text = (
            {"calibration": [str(tmp_path / "pairs.jsonl")]}
            if family == "t5"
            else {"calibration_tokens": 1024}
        )
        jobs.append((str(source), str(tmp_path / "device" / name), options | text))
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    (tmp_path / "device").mkdir()
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("pretended_gpu.py"), tmp_path],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == list(JOBS)
    for name, (source, out, options) in zip(JOBS, jobs):
        convert(source, tmp_path / "cpu" / name, **options)
        there, here = (written(folder) for folder in (out, tmp_path / "cpu" / name))
        # factors are free to turn, what they stand for is not; a dozen pairs leave rounding more
        # room, and a latent at the border of two codes may take either
        loose = family_of(source) == "t5" or "codes" in name
        assert relative(there, here) < (1e-2 if loose else 1e-3), name


def family_of(folder) -> str:
    return json.loads((Path(folder) / "config.json").read_text())["model_type"]


@torch.no_grad()
def written(folder) -> torch.Tensor:
    """Logits of a converted model."""
    model = load(folder)
    return (
        logits(model, target())
        if model.config.is_encoder_decoder
        else model(prompt(), use_cache=False).logits
    )
