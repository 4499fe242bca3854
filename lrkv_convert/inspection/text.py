"""Text to measure on."""
from torch import Tensor

from ..calibrate import Text, window_length, windows
from ..checkpoint import Checkpoint
from ..errors import LrkvError


def text_windows(text: Text, checkpoint: Checkpoint, max_tokens: int) -> Tensor:
    """Windows (N, T) of token ids, spread evenly over a text. Raises LrkvError for one that does not fill a window."""
    length, tokenizer = window_length(checkpoint.config), checkpoint.tokenizer()
    try:
        return windows([text], tokenizer, length, max_tokens)
    except LrkvError as error:
        raise LrkvError(f"the text {text.name} is empty or too short: it does not fill one window of {length} tokens", "give a longer one") from error
