"""How well a model predicts what is held out."""

from typing import cast

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from .batch import together
from .data import Data
from .divergence import divergence


@torch.no_grad()
def validation_loss(accelerator: Accelerator, model: PreTrainedModel, data: Data) -> float:
    """Mean negative log-likelihood of the held-out examples, in nats per predicted token."""
    held, training = data.validation, model.training
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    model.eval()
    # every process takes as many passes, because a sharded model needs all of them in each; an
    # example seen before counts for nothing
    for i in range(-(-len(held) // accelerator.num_processes)):
        at = i * accelerator.num_processes + accelerator.process_index
        index = held[min(at, len(held) - 1)].unsqueeze(0)
        batch = together(data.examples(index)).to(accelerator.device)
        with accelerator.autocast():
            logits = model(**batch.inputs, use_cache=False).logits[0]
        if at < len(held):
            _, _, ce = divergence(logits, None, batch.predicts[0], 0.0)
            n = data.predicted_of(index)
            sums += torch.tensor([ce.double() * n, n], dtype=torch.float64, device=sums.device)
    model.train(training)
    total, count = cast(torch.Tensor, accelerator.reduce(sums, "sum")).tolist()
    return total / count
