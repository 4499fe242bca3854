"""Give back what a conversion cost: heal on a text, then compare original, converted and healed on
text that none of them was trained on.

    python examples/heal_and_compare.py [MODEL] [--data FILE] [--text FILE] [--tokens 2048]

Without files, the text that ships with the package is trained on and Python's reference manual
compared on. 2,048 tokens only show the way: `lrkv heal` trains on 200,000. Under two minutes on two
CPU cores.
"""

import argparse
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

from lrkv_convert import convert
from lrkv_convert.demo import demo_model
from lrkv_convert.device import pick_device
from lrkv_convert.evaluate import compare
from lrkv_convert.examples.text import BUILT_IN, Text, read_texts
from lrkv_convert.healing import heal

parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?")
parser.add_argument("--data")
parser.add_argument("--text")
parser.add_argument("--tokens", type=int, default=2048)
args = parser.parse_args()
model = args.model or str(demo_model())

with tempfile.TemporaryDirectory() as folder:
    half, healed, data = Path(folder, "half"), Path(folder, "healed"), Path(folder, "data.txt")
    data.write_text(read_texts([args.data or BUILT_IN])[0].content, encoding="utf-8")
    convert(model, half, cache_ratio=0.5, bits=16, calibration_tokens=2048)
    done = heal(
        half,
        healed,
        [str(data)],
        teacher=model,
        tokens=args.tokens,
        seq_len=256,
        validation_tokens=512,
        tracker="none",
    )
    print(f"{done.entry.tokens:,} tokens in {done.entry.seconds:.0f} s of training")
    text = (
        read_texts([args.text])[0]
        if args.text
        else Text("Python reference manual", "\n\n".join(topics[name] for name in sorted(topics)))
    )
    result = compare(
        [model, str(half), str(healed)], [text], max_tokens=512, device=pick_device("auto")
    )
for row in result["models"]:
    sure = f" (95 %: {row['ratio_low']:.3f} to {row['ratio_high']:.3f})" if row["ratio_low"] else ""
    print(
        f"{row['name']:>30}: perplexity ×{row['ratio']:.3f}{sure}, KL {row['kl']:.3f},"
        f" {row['kv_ratio']:.0%} of the cache"
    )
