"""Healing that is stopped: checkpoints are whole whatever happens, and a resumed run ends with the
same bytes as one that was not stopped.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SHORT, ctrl_c_after, in_training, log
from safetensors.torch import load_file

from lrkv_convert import LrkvError
from lrkv_convert.healing import heal

KILLED = """
import os, signal, sys
import torch
torch.set_num_threads({threads})
from lrkv_convert.healing import heal
from lrkv_convert.train import loop, result, run
moment, count = {moment!r}, 0

def dies(module, name, at, after=False):
    real = getattr(module, name)
    def instead(*args, **kwargs):
        global count
        count += 1
        if count == at and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(module, name, instead)

if moment == "before any checkpoint":
    dies(loop.Trainer, "step", 2)
elif moment == "in a step":
    dies(loop.Trainer, "step", 4)
elif moment == "in mid-checkpoint":         # weights are written, the rest is not
    dies(run, "write_json", 3)              # heal.json, then state.json of every checkpoint
elif moment == "before a checkpoint has its name":
    # heal.json, windows.json, then state.json and the checkpoint itself, twice
    dies(run.os, "replace", 6)
elif moment == "before old checkpoints go":
    dies(run.shutil, "rmtree", 6, after=True)
elif moment == "while the result is written":
    dies(result.ShardWriter, "add", 9)
elif moment == "before the result has its name":
    dies(result, "publish", 1)
elif moment == "after the result has its name":
    dies(result, "publish", 1, after=True)
heal({model!r}, {out!r}, [{data!r}], resume={resume}, **{options})
"""


def child(moment, model, out, data, resume=False, **options):
    code = KILLED.format(
        moment=moment,
        model=str(model),
        out=str(out),
        data=str(data),
        resume=resume,
        options=SHORT | {"keep": 1} | options,
        threads=torch.get_num_threads(),
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def whole(converted, sheep, tmp_path_factory):
    """The result of a run that nobody disturbed."""
    return heal(converted(), tmp_path_factory.mktemp("whole") / "out", [str(sheep)], **SHORT).out


def timeless(folder) -> list[dict]:
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")}
        for line in log(folder)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment",
    [
        "in a step",
        "in mid-checkpoint",
        "before a checkpoint has its name",
        "before old checkpoints go",
        "while the result is written",
        "before the result has its name",
    ],
)
def test_killed_at_any_moment_the_run_resumes_to_the_same_bytes(
    moment, whole, converted, sheep, tmp_path
):
    out = tmp_path / "out"
    assert child(moment, converted(), out, sheep).returncode == -signal.SIGKILL
    assert not out.exists()
    # those that bear a name are whole
    for checkpoint in (tmp_path / "out.partial" / "work").glob("checkpoint-??????"):
        assert json.loads((checkpoint / "state.json").read_text())["step"] == int(
            checkpoint.name[-6:]
        )
        assert (
            load_file(checkpoint / "model.safetensors")
            and (checkpoint / "optimizer.bin").stat().st_size
        )
    with pytest.raises(
        LrkvError, match="holds a run that stopped after step [246].*--resume goes on"
    ):
        heal(converted(), out, [str(sheep)], **SHORT)
    assert not out.exists()
    if moment == "in a step":  # as users do, in a fresh process
        done = child(None, converted(), out, sheep, resume=True)
        assert done.returncode == 0, done.stderr
    else:
        heal(converted(), out, [str(sheep)], resume=True, **SHORT)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert timeless(out) == timeless(whole)
    assert {p.name for p in out.iterdir()} == {p.name for p in whole.iterdir()} and {
        p.name for p in tmp_path.iterdir()
    } == {"out"}


@pytest.mark.slow
def test_killed_at_the_very_end_the_result_is_whole(whole, converted, sheep, tmp_path):
    assert (
        child("after the result has its name", converted(), tmp_path / "out", sheep).returncode
        == -signal.SIGKILL
    )
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        whole / "model.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_killed_before_the_first_checkpoint_there_is_nothing_to_resume_and_it_begins_anew(
    whole, converted, sheep, tmp_path
):
    assert (
        child("before any checkpoint", converted(), tmp_path / "out", sheep).returncode
        == -signal.SIGKILL
    )
    said = []
    heal(converted(), tmp_path / "out", [str(sheep)], resume=True, notice=said.append, **SHORT)
    assert len(said) == 1 and "no checkpoint" in said[0]
    with pytest.raises(LrkvError, match="is finished: there is nothing to resume"):
        heal(converted(), tmp_path / "out", [str(sheep)], resume=True, **SHORT)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        whole / "model.safetensors"
    ).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_stop_saves_the_step_in_hand(number, converted, sheep, tmp_path):
    """Through the command line, with checkpoints far apart: the one it leaves is of the signal."""
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); sys.argv ="
        " ['lrkv'] + sys.argv[1:]; from lrkv_cli.main import app; app()"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "heal",
        str(converted()),
        "--data",
        str(sheep),
        "--out",
        str(tmp_path / "out"),
        "--tokens",
        str(4 * 64 * 500),
        "--set",
        "seq_len=64",
        "validation_tokens=64",
        "checkpoint_every=100000",
        "validate_every=1000",
        "precision=fp32",
        "tracker=none",
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=dict(os.environ, OMP_NUM_THREADS="1")
    )
    follow, until = tmp_path / "out.partial" / "heal.jsonl", time.time() + 120
    while (
        not (follow.is_file() and len(follow.read_text().splitlines()) > 3) and time.time() < until
    ):
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    last = stderr.strip().splitlines()[-1]
    [checkpoint] = (tmp_path / "out.partial" / "work").glob("checkpoint-*")
    step = json.loads((checkpoint / "state.json").read_text())["step"]
    assert (
        last.startswith(f"interrupted after step {step} of 500, which {tmp_path}")
        and "--resume" in last
        and "Traceback" not in stderr
    )


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_batch_and_checkpoint(
    converted, sheep, tmp_path
):
    def spoilt(call, output):
        if call == 4 * 4 + 2:
            output.logits = output.logits * float("nan")
        return output

    with (
        in_training(spoilt),
        pytest.raises(LrkvError, match="the loss is nan at step 5, windows ") as refusal,
    ):
        heal(converted(), tmp_path / "out", [str(sheep)], **SHORT)
    assert (
        "checkpoint-000004" in str(refusal.value)
        and len(str(refusal.value).split("windows ")[1].split(" (")[0].split(",")) == 4
    )
    heal(converted(), tmp_path / "out", [str(sheep)], resume=True, **SHORT)


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_does_harm(
    converted, sheep, tmp_path, monkeypatch
):
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda *a, **k: float("inf"))
    with pytest.raises(
        LrkvError, match="the gradient's norm is inf at step 1.*there is no checkpoint yet"
    ):
        heal(converted(), tmp_path / "out", [str(sheep)], **SHORT)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_previous_checkpoint_and_the_way_to_go_on(
    whole, converted, sheep, tmp_path, monkeypatch
):
    from accelerate import Accelerator

    save, saved = Accelerator.save_state, []

    def full(self, folder, *args, **kwargs):
        saved.append(folder)
        if len(saved) == 2:
            os.makedirs(folder)
            with open(os.path.join(folder, "model.safetensors"), "w") as half:
                half.write("half")
            raise OSError(28, "No space left on device")
        return save(self, folder, *args, **kwargs)

    monkeypatch.setattr(Accelerator, "save_state", full)
    with pytest.raises(
        LrkvError,
        match="cannot save the checkpoint of step 4: .*No space left.*checkpoint-000002; make room",
    ):
        heal(converted(), tmp_path / "out", [str(sheep)], **SHORT)
    assert [p.name for p in (tmp_path / "out.partial" / "work").glob("checkpoint-*")] == [
        "checkpoint-000002"
    ]
    heal(converted(), tmp_path / "out", [str(sheep)], resume=True, **SHORT)
    assert log(tmp_path / "out")[-1]["step"] == 6


def test_a_disk_that_is_full_at_the_end_keeps_the_last_checkpoint(
    converted, sheep, tmp_path, monkeypatch
):
    from lrkv_convert.train import result

    monkeypatch.setattr(
        result, "write", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(LrkvError, match="No space left on device.*checkpoint-000006.*--resume"):
        heal(converted(), tmp_path / "out", [str(sheep)], **SHORT)
    monkeypatch.undo()
    heal(converted(), tmp_path / "out", [str(sheep)], resume=True, **SHORT)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_last_checkpoints_are_kept(converted, sheep, tmp_path):
    """As seen before every step is saved, and at the end."""
    work, seen = tmp_path / "out.partial" / "work", []
    look = lambda *_: seen.append(sorted(p.name[-2:] for p in work.glob("checkpoint-*")))
    heal(
        converted(),
        tmp_path / "out",
        [str(sheep)],
        report=look,
        stage=lambda name: look() if name == "writing" else None,
        **{**SHORT, "checkpoint_every": 1, "keep": 3},
    )
    assert seen == [
        [],
        ["01"],
        ["01", "02"],
        ["01", "02", "03"],
        ["02", "03", "04"],
        ["03", "04", "05"],
        ["04", "05", "06"],
    ]


def test_a_resume_may_pass_through_the_batch_in_another_way(converted, sheep, tmp_path, whole):
    options = {**SHORT, "micro_batch_size": 2}
    with pytest.raises(KeyboardInterrupt, match="interrupted after step 2 of 6"):
        heal(converted(), tmp_path / "out", [str(sheep)], report=ctrl_c_after(2), **options)
    heal(converted(), tmp_path / "out", [str(sheep)], resume=True, **SHORT)
    assert [line["loss"] for line in log(tmp_path / "out") if "loss" in line] == pytest.approx(
        [line["loss"] for line in log(whole) if "loss" in line], rel=1e-4
    )
    a, b = load_file(tmp_path / "out" / "model.safetensors"), load_file(whole / "model.safetensors")
    assert all(torch.allclose(a[name], b[name], rtol=1e-2, atol=1e-3) for name in a)


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"muon_lr": 1e-3}, "muon_lr 0.0005, not 0.001"),
        ({"tokens": 8 * 4 * 64}, "tokens"),
        ({"data": "other"}, "data"),
        ({"model": "other"}, "begun from other weights"),
    ],
)
def test_a_resume_with_other_arguments_is_refused_and_harms_nothing(
    changed, says, converted, sheep, tmp_path
):
    with pytest.raises(KeyboardInterrupt, match="interrupted after step 4 of 6, which"):
        heal(converted(), tmp_path / "out", [str(sheep)], report=ctrl_c_after(4), **SHORT)
    other = tmp_path / "other.txt"
    other.write_text(sheep.read_text())
    model = converted(base="mean") if changed.pop("model", None) else converted()
    data = [str(other)] if changed.pop("data", None) else [str(sheep)]
    with pytest.raises(LrkvError, match=says):
        heal(model, tmp_path / "out", data, resume=True, **{**SHORT, **changed})
    # these may differ
    heal(
        converted(),
        tmp_path / "out",
        [str(sheep)],
        resume=True,
        **{**SHORT, "checkpoint_every": 1, "micro_batch_size": 2},
    )


@pytest.mark.slow
def test_overwrite_begins_anew(converted, sheep, tmp_path, whole):
    assert child("in a step", converted(), tmp_path / "out", sheep).returncode == -signal.SIGKILL
    heal(converted(), tmp_path / "out", [str(sheep)], overwrite=True, **SHORT)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        whole / "model.safetensors"
    ).read_bytes()


def test_what_is_not_ours_is_not_removed(converted, sheep, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(LrkvError, match="is in the way"):
            heal(converted(), tmp_path / "out", [str(sheep)], overwrite=overwrite, **SHORT)
    assert (tmp_path / "out.partial" / "thesis.tex").read_text() == "x"


def test_an_interrupted_conversion_is_replaced_only_if_asked(converted, sheep, tmp_path):
    from lrkv_convert.folder.store import Store

    Store(tmp_path / "out.partial" / "work", {}).save("fitted-0", 1)
    with pytest.raises(LrkvError, match="is in the way"):
        heal(converted(), tmp_path / "out", [str(sheep)], **SHORT)
    heal(converted(), tmp_path / "out", [str(sheep)], overwrite=True, **SHORT)


def test_two_runs_do_not_write_one_folder(converted, sheep, tmp_path):
    def again(stage: str) -> None:
        if stage == "training":
            heal(converted(), tmp_path / "out", [str(sheep)], overwrite=True, **SHORT)

    with pytest.raises(LrkvError, match="another process is writing"):
        heal(converted(), tmp_path / "out", [str(sheep)], stage=again, **SHORT)


@pytest.mark.slow
def test_packed_data_of_a_killed_run_is_used_again(converted, sheep, tmp_path):
    """What it was packed of may have been emptied since."""
    text = Path(shutil.copy(sheep, tmp_path / "text.txt"))
    assert (
        child("before any checkpoint", converted(), tmp_path / "out", text).returncode
        == -signal.SIGKILL
    )
    text.write_text("")
    heal(converted(), tmp_path / "out", [str(text)], **{**SHORT, "keep": 1})


def test_a_second_interruption_says_what_there_is(converted, sheep, tmp_path):
    def twice(line: dict) -> None:
        if line["step"] == 5:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(
        KeyboardInterrupt, match="checkpoint-000004; the same command with --resume"
    ):
        heal(converted(), tmp_path / "out", [str(sheep)], report=twice, **SHORT)


@pytest.mark.slow
def test_a_checkpoint_that_does_not_open_is_named(converted, sheep, tmp_path):
    assert child("in a step", converted(), tmp_path / "out", sheep).returncode == -signal.SIGKILL
    [checkpoint] = (tmp_path / "out.partial" / "work").glob("checkpoint-*")
    (checkpoint / "model.safetensors").write_bytes(b"half")
    with pytest.raises(LrkvError, match="cannot go on from .*checkpoint-000002"):
        heal(converted(), tmp_path / "out", [str(sheep)], resume=True, **SHORT)


def test_out_of_memory_names_the_remedy(converted, sheep, tmp_path):
    def full(call, output):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with (
        in_training(full),
        pytest.raises(LrkvError, match="out of memory at step 1: .*smaller micro_batch_size"),
    ):
        heal(converted(), tmp_path / "new" / "deep" / "out", [str(sheep)], **SHORT)
    assert not list(tmp_path.iterdir())
