"""Choose the smallest cache that costs no more than you allow: sweep a few sizes on your own text,
take the first that is good enough.

    python examples/choose_a_rank.py [MODEL] [--text FILE] [--allow 1.15] [--ranks 8,20,32]

Without a text, Python's own reference manual is read. Two sizes of SmolLM2-135M take under two
minutes on two CPU cores.
"""

import argparse
from pydoc_data.topics import topics

from lrkv_convert.demo import demo_model
from lrkv_convert.device import pick_device
from lrkv_convert.examples.text import Text, read_texts
from lrkv_convert.frontier import sweep

parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?")
parser.add_argument("--text")
parser.add_argument(
    "--allow", type=float, default=1.15, help="the largest perplexity ratio you would accept"
)
parser.add_argument(
    "--ranks", default="8,20", help="sizes, as the residual rank whose bytes they match"
)
args = parser.parse_args()
model = args.model or str(demo_model())
text = (
    read_texts([args.text])[0]
    if args.text
    else Text("Python reference manual", "\n\n".join(topics[name] for name in sorted(topics)))
)

# "codes" plans bits layer by layer in the bytes of each rank, as --cache-ratio does
found = sweep(
    model,
    [int(rank) for rank in args.ranks.split(",")],
    text,
    methods=["codes"],
    calibration_tokens=2048,
    max_tokens=1024,
    device=pick_device("auto"),
)
points = sorted(found["points"], key=lambda point: point["cache_ratio"])
for point in points:
    print(
        f"{point['cache_ratio']:6.1%} of the cache: perplexity ×{point['ratio']:.3f}, KL"
        f" {point['kl']:.3f}"
    )
good = [point for point in points if point["ratio"] <= args.allow and point["cache_ratio"] < 1]
print(
    f"take --cache-ratio {good[0]['cache_ratio']:.2f}"
    if good
    else f"none costs less than ×{args.allow}: allow more, or heal afterwards"
)
