"""What a model writes."""
import torch

from .load import load_model, load_tokenizer


@torch.no_grad()
def continuations(model: str, prompts: tuple[str, ...], device: torch.device, max_new_tokens: int = 16) -> list[str]:
    """Greedy continuations of the prompts, without the prompts."""
    loaded, tokenizer = load_model(model, device), load_tokenizer(model)
    texts = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt").to(device)
        ids = loaded.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id)
        texts.append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
    return texts
