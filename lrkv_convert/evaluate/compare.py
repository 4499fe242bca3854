"""Perplexity of several models on one text, and how far each is from the first, token by token.

Protocol: perplexity = exp(total negative log-likelihood / predicted tokens), in nats, over the whole text in non-overlapping windows of
`seq_len` tokens (the last one may be shorter), no BOS token added, every token of a window but its first predicted. KL(base || other) and
top-1 agreement are means over the same tokens. Logits are taken to float32 first.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..calibrate import Text
from ..errors import LrkvError
from .load import load_model, load_tokenizer
from .memory import allocated_bytes, formula_bytes


@dataclass
class Sums:
    """Totals over the predicted tokens of one model."""

    nll: float = 0.0
    kl: float = 0.0
    agree: int = 0


def text_windows(ids: Tensor, seq_len: int, batch_size: int) -> list[Tensor]:
    """Token ids (n,) -> batches (N, T) of non-overlapping windows, the shorter last one on its own; one left-over token is dropped."""
    whole = len(ids) // seq_len * seq_len
    batches = list(ids[:whole].view(-1, seq_len).split(batch_size)) if whole else []
    return batches + ([ids[whole:].unsqueeze(0)] if len(ids) - whole > 1 else [])


@torch.no_grad()
def measure(models: list[PreTrainedModel], batches: list[Tensor], progress: Callable[[int, int], None] = lambda *_: None) -> tuple[list[Sums], int]:
    """Sums for every model, the first being the base, and the number of predicted tokens."""
    sums, predicted = [Sums() for _ in models], 0
    for done, batch in enumerate(batches):
        base = base_top = None
        for model, total in zip(models, sums):
            ids = batch.to(model.device)
            logits = model(ids, use_cache=False).logits[:, :-1].float().flatten(0, 1)        # (n, vocabulary)
            logp = torch.log_softmax(logits, dim=-1)
            total.nll -= logp.gather(1, ids[:, 1:].reshape(-1, 1)).double().sum().item()
            top = logp.argmax(-1)
            if base is None:
                base, base_top = logp, top
                total.agree += len(top)
            else:
                total.kl += torch.nn.functional.kl_div(logp, base, log_target=True, reduction="sum").double().item()
                total.agree += (top == base_top).sum().item()
        predicted += base.shape[0]
        progress(done + 1, len(batches))
    return sums, predicted


def compare(paths: list[str], text: Text, *, seq_len: int = 512, max_tokens: int | None = None, batch_size: int = 1, device: torch.device,
            dtype: torch.dtype | str = "auto", progress: Callable[[int, int], None] = lambda *_: None) -> dict:
    """Compare `paths[1:]` with `paths[0]` on `text`. Returns the JSON the README describes. Raises LrkvError.

    seq_len: window in tokens; max_tokens: read no more of the text than this; batch_size: windows per forward pass.
    """
    ids = torch.tensor(load_tokenizer(paths[0])(text.content, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)[:max_tokens]
    if len(ids) < 2:
        raise LrkvError(f"the text {text.name} is empty or too short", "perplexity needs at least two tokens")
    models = [load_model(path, device, dtype) for path in paths]
    for path, model in zip(paths, models):
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and seq_len > limit:
            raise LrkvError(f"windows of {seq_len} tokens are longer than {path} can read ({limit})", "give a smaller --seq-len")
        if model.config.vocab_size != models[0].config.vocab_size:
            raise LrkvError(f"{path} has another vocabulary than {paths[0]}", "compare a converted model with its own original")
    sums, predicted = measure(models, text_windows(ids, seq_len, batch_size), progress)
    rows = []
    for path, model, total in zip(paths, models, sums):
        bytes_per_token, nll = formula_bytes(model.config, model.dtype.itemsize), total.nll / predicted
        allocated = allocated_bytes(model, min(16, seq_len))
        rows.append({
            "path": path, "nll": nll, "perplexity": float(torch.tensor(nll, dtype=torch.float64).exp()), "kl": total.kl / predicted,
            "top1_agreement": total.agree / predicted, "kv_bytes_per_token": bytes_per_token if bytes_per_token is not None else allocated,
            "kv_bytes_per_token_allocated": allocated, "parameters": sum(p.numel() for p in model.parameters()), "dtype": str(model.dtype).removeprefix("torch.")})
    for row in rows:
        row["ratio"] = row["perplexity"] / rows[0]["perplexity"]
        row["kv_ratio"] = row["kv_bytes_per_token"] / rows[0]["kv_bytes_per_token"]
    return {"text": {"name": text.name, "sha256": text.sha256}, "tokens": predicted, "seq_len": seq_len, "bos": "none", "device": str(device),
            "models": rows}
