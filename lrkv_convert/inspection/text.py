"""Text to measure on."""

from torch import Tensor

from ..errors import LrkvError
from ..examples.text import Text, check_ids, window_length, windows
from ..source import Checkpoint


def text_windows(text: Text, checkpoint: Checkpoint, max_tokens: int) -> Tensor:
    """Windows (N, T) of token ids, spread evenly over a text; a text too short for calibration's
    windows is one shorter window. Raises LrkvError.
    """
    tokenizer = checkpoint.tokenizer()
    length = min(
        window_length(checkpoint.config),
        max_tokens,
        len(tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"]),
    )
    if length < 2:
        raise LrkvError(
            f"the text {text.name} is empty or too short", "a loss needs at least two tokens"
        )
    found = windows([text], tokenizer, length, max_tokens)
    check_ids(found, checkpoint.config.vocab_size, checkpoint.source)
    return found
