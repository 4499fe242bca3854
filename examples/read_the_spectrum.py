"""Before converting: how much do the heads of a model share, and what would half of its cache cost?

    python examples/read_the_spectrum.py [MODEL] [--target-kl 0.05]

Nothing is written. SmolLM2-135M takes about a minute on two CPU cores; `lrkv inspect MODEL` reads
more text and shows every layer.
"""

import argparse

from lrkv_convert.demo import demo_model
from lrkv_convert.inspection import inspect

parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?")
parser.add_argument(
    "--target-kl", type=float, default=0.05, help="nats per token that you would give up"
)
args = parser.parse_args()

found = inspect(args.model or str(demo_model()), calibration_tokens=2048, target_kl=args.target_kl)
looked, layers = found["attention"]["self"], found["attention"]["self"]["layers"]
for side in ("keys", "values"):
    share = sum(layer[side]["base_share"] for layer in layers) / len(layers)
    print(f"one base as wide as a head explains {share:.1%} of the energy of all {side}")
for row in looked["ranks"]:
    if row["planned_kl"] is not None:
        print(
            f"rank {row['rank']:>3}: {row['cache_ratio']:.1%} of the cache, predicted KL"
            f" {row['predicted_kl']:.3f}; planned layer by layer {row['planned_kl']:.3f}"
        )
ratio = found["recommended"]["cache_ratio"]
print(
    f"take --cache-ratio {ratio:g}"
    if ratio
    else f"no cache smaller than the original's is predicted to stay within {args.target_kl} nats"
)
