"""Whether a converted folder writes the same text under every release of transformers:

    make test-releases
    for r in lowest pinned newest; do .venv-releases/$r/bin/python benchmarks/same_text.py DIR; done

Each run prints its release, whether this package was there or the folder's own files alone, and the
sha256 of four continuations: greedy, of three beams, and from a static cache.
"""

import argparse
import hashlib
import subprocess
import sys

PROMPTS = (
    "The capital of France is",
    "Water boils when",
    "My favourite book is about",
    "def fibonacci(n):",
)
WAYS = ({}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True})


def write(folder: str, alone: bool) -> None:
    if alone:
        sys.modules["lrkv_convert"] = None
    else:
        import lrkv_convert  # noqa: F401  (registers the classes)
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)  # sums in one order
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=alone
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=alone)
    ends = dict(max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.pad_token_id or 0)
    texts = [
        tokenizer.decode(model.generate(**tokenizer(prompt, return_tensors="pt"), **ends, **way)[0])
        for prompt in PROMPTS
        for way in WAYS
    ]
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    by = "the folder's own files" if alone else "this package"
    print(f"transformers {transformers.__version__}, {by}: {digest[:16]} {texts[0][:60]!r}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--alone", choices=["yes", "no"], help="one of the two; default: both")
    given = parser.parse_args()
    if given.alone:
        write(given.folder, given.alone == "yes")
    else:
        for alone in ("yes", "no"):
            subprocess.run([sys.executable, __file__, given.folder, "--alone", alone], check=True)
