"""Peak memory of a conversion against the size of the model: a checkpoint of random weights with
layers like Llama-2-7B's, converted in a process of its own.

    python benchmarks/large.py [--layers 14] [--folder DIR] [--json FILE] [-- options of lrkv
    convert]

With 14 layers the checkpoint has 6.2 GB. The bound is 1.5 GB + three times the largest layer +
activations, whatever the number of layers.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from accelerate import init_empty_weights
from environment import environment
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from lrkv_convert.folder.writer import ShardWriter, write_json

CONVERT = """
import sys
from lrkv_cli.main import app
sys.argv = ["lrkv", "convert", *sys.argv[1:]]
app()
"""


def make(folder: Path, layers: int) -> None:
    """Random bfloat16 weights, written tensor by tensor, and a tokenizer of bytes."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        vocab_size=32000,
        max_position_embeddings=4096,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    with init_empty_weights():
        shapes = {
            name: (tuple(p.shape), torch.bfloat16)
            for name, p in AutoModelForCausalLM.from_config(config).named_parameters()
        }
    writer, generator = ShardWriter(folder, shapes, "2GB"), torch.Generator().manual_seed(0)
    for name, (shape, dtype) in shapes.items():
        writer.add(
            name,
            (
                torch.ones(shape)
                if len(shape) == 1
                else torch.randn(shape, generator=generator, dtype=dtype) * 0.02
            ),
        )
    writer.finish()
    backend = Tokenizer(
        models.BPE(
            vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))},
            merges=[],
        )
    )
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)


def main() -> None:
    own, theirs = (
        (sys.argv[1:], [])
        if "--" not in sys.argv
        else (sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :])
    )
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument(
        "--folder", type=Path, help="where to put checkpoint and result; a temporary one by default"
    )
    parser.add_argument("--json", type=Path)
    args, options = (
        parser.parse_args(own),
        theirs
        or [
            "--rank",
            "46",
            "--calibration-tokens",
            "1024",
        ],
    )
    with tempfile.TemporaryDirectory() as temporary:
        place = args.folder or Path(temporary)
        if not (place / "source").exists():
            make(place / "source", args.layers)
        subprocess.run(
            [
                sys.executable,
                "-c",
                CONVERT,
                str(place / "source"),
                "--out",
                str(place / "out"),
                "--overwrite",
                *options,
            ],
            check=True,
        )
        record = json.loads((place / "out" / "lrkv.json").read_text())
        layers = json.loads((place / "source" / "config.json").read_text())["num_hidden_layers"]
        size = sum(f.stat().st_size for f in (place / "source").glob("*.safetensors"))
    # in the float32 it is run in
    layer = 4 * (4 * 4096**2 + 3 * 4096 * 11008)
    # hidden states of all windows, and inputs and head outputs of one layer; hidden states and
    # gradients of the gradient windows are no more
    activations = 3 * 4 * 4096 * record["calibration"]["tokens"]
    peak, bound = record["peak_memory_bytes"], 1.5e9 + 3 * layer + activations
    print(
        f"checkpoint {size / 1e9:.2f} GB, {layers} layers; peak memory {peak / 1e9:.2f} GB ="
        f" {peak / size:.0%} of it; bound 1.5 GB + 3 layers of {layer / 1e9:.2f} GB + activations ="
        f" {bound / 1e9:.2f} GB; {record['seconds']:.0f} s"
    )
    print(f"options: {' '.join(options)}; seconds per stage: {record['seconds_per_stage']}")
    if args.json:
        write_json(
            args.json,
            {
                **environment(torch.device("cpu")),
                "layers": layers,
                "options": options,
                "checkpoint_bytes": size,
                "bound_bytes": int(bound),
                **{k: record[k] for k in ("peak_memory_bytes", "seconds", "seconds_per_stage")},
            },
        )


if __name__ == "__main__":
    main()
