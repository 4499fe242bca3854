"""Four numbers hidden in prose, each asked for at the end: mean nats per token of the answers.

    python benchmarks/needles.py MODEL DIR... --text TEXT [--tokens 900] [--texts 5] [--json FILE]

A steadier figure than how many are found: the loss of an answer moves long before it is lost. After
the multi-key task of RULER (Hsieh et al. 2024, arXiv 2404.06654): needles of one form with
different keys, so that each must be told from the others. TEXT is prose that no conversion saw; the
needles lie at even depths between its sentences, and every model is asked for the same numbers.
"""

import argparse
import statistics
from pathlib import Path

import torch
from environment import environment

from lrkv_convert.device import pick_device
from lrkv_convert.evaluate.load import load_model, load_tokenizer
from lrkv_convert.evaluate.longcontext import recall
from lrkv_convert.evaluate.perplexity import Candidate
from lrkv_convert.folder.writer import write_json

KEYS = ("harbour", "orchard", "lantern", "compass", "meadow", "chimney", "saddle", "velvet")
NEEDLE = " The secret number of the {key} is {number}."
QUESTION = "\n\nWhat is the secret number of the {key}? The secret number of the {key} is"
HIDDEN = 4


def prompts(tokenizer, prose: list[str], tokens: int, generator: torch.Generator) -> list[tuple]:
    """[(ids, ids of the answer)] of one text, one for each of its needles."""
    plain = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    keys = [KEYS[i] for i in torch.randperm(len(KEYS), generator=generator)[:HIDDEN]]
    numbers = torch.randint(1000, 10000, (HIDDEN,), generator=generator).tolist()
    needles = [plain(NEEDLE.format(key=k, number=n)) for k, n in zip(keys, numbers)]
    room, sentences = tokens - sum(map(len, needles)) - 40, []
    for sentence in prose:
        if (room := room - len(plain(sentence))) < 0:
            break
        sentences.append(sentence)
    places = [round((i + 0.5) / HIDDEN * len(sentences)) for i in range(HIDDEN)]
    ids = tokenizer("")["input_ids"]  # what every text begins with, if anything
    for i, sentence in enumerate(sentences):
        for place, needle in zip(places, needles):
            ids = ids + needle if place == i else ids
        ids = ids + plain(sentence)
    found = []
    for key, number in zip(keys, numbers):
        question = plain(QUESTION.format(key=key))
        answer = plain(f"{QUESTION.format(key=key)} {number}.")[len(question) :]
        found.append((torch.tensor(ids + question), torch.tensor(answer)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="the original, then what was made of it")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=900)
    parser.add_argument("--texts", type=int, default=5, help="each with four needles")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device, tokenizer = pick_device("auto"), load_tokenizer(args.models[0])
    text = " ".join(args.text.read_text(encoding="utf-8").split())
    sentences = [f" {part.strip()}." for part in text.split(". ")]
    generator, asked = torch.Generator().manual_seed(0), []
    each = len(sentences) // args.texts
    for i in range(args.texts):
        asked += prompts(tokenizer, sentences[i * each :], args.tokens, generator)
    rows = []
    print(
        "| model | mean nats of an answer's token | of the original's | found |\n|---|---|---|---|"
    )
    for name in args.models:
        candidate = Candidate(load_model(name, device, torch.float32))
        results = [recall(candidate, ids, answer) for ids, answer in asked]
        nats = statistics.mean(nll for _, nll in results)
        found = sum(right for right, _ in results)
        rows.append({"model": Path(name).name, "nats": nats, "found": found, "asked": len(asked)})
        ratio = nats / rows[0]["nats"]
        print(f"| {Path(name).name} | {nats:.3f} | ×{ratio:.2f} | {found} of {len(asked)} |")
    lengths = [len(ids) for ids, _ in asked]
    print(f"\n{len(asked)} questions after {min(lengths)} to {max(lengths)} tokens, float32")
    if args.json:
        write_json(
            args.json,
            {**environment(device), "text": args.text.name, "tokens": args.tokens, "rows": rows},
        )


if __name__ == "__main__":
    main()
