"""What a user may ask of healing: the fields of a recipe (recipes/heal/*.yaml), one by one. Checked
before anything is loaded.
"""

from dataclasses import dataclass

from ..errors import LrkvError
from ..settings.fields import POSITIVE, Typed, at_least, at_most, between, option

FASTEST = (
    1000  # of learning rates: far beyond any that is of use; float32 ends, in errors of its own
)
FORGETS = ("momentum", "beta1", "beta2")  # averages, of which 1 would be none


@dataclass(frozen=True)
class Options(Typed):
    """How to heal. The defaults are the recipe `short`. Raises LrkvError for a value of the wrong
    type. Which parameters are hidden matrices is in train/optimise.py, the loss in
    train/objective.py.
    """

    # what is read
    tokens: int = option(
        200_000,
        "Tokens to train on; shorter text is read again, in another order.",
        limits=[at_least(1)],
    )
    seq_len: int = option(512, "Tokens per window.", limits=[at_least(2)], advanced=True)
    batch_size: int = option(
        4, "Windows per step, over all processes.", limits=[at_least(1)], advanced=True
    )
    micro_batch_size: int = option(
        1,
        "Windows per pass of one process; the rest is accumulated.",
        limits=[at_least(1)],
        advanced=True,
    )
    seed: int = option(
        0, "Of the order of the windows.", limits=[between(0, 2**31 - 1)], advanced=True
    )
    text_field: str = option(
        "text", "Where the text stands in jsonl, parquet and datasets.", advanced=True
    )
    retrieval: float = option(
        0.0,
        "Share of the windows that hide numbers and words in the text, and ask for them.",
        limits=[between(0, 0.9)],
    )
    validation: list[str] | None = option(
        None, "A text file of its own to validate on, or several: [a.txt, b.txt].", advanced=True
    )
    validation_tokens: int = option(
        8192,
        "Held out of the data, unless `validation` is given.",
        limits=[at_least(1)],
        advanced=True,
    )

    # what is minimised
    loss: str = option(
        "auto",
        "kl to the original, ce (cross-entropy), mix, or auto: kl, else ce.",
        choices=["auto", "kl", "ce", "mix"],
    )
    kl_weight: float = option(0.5, "Share of kl in mix.", limits=[between(0, 1)], advanced=True)
    match_attention: float = option(
        0.0,
        "Weight of the squared error of attention outputs; 0: none.",
        limits=[at_least(0)],
        advanced=True,
    )

    # what is trained, and by what
    train: str = option(
        "attention",
        "attention (W_shared, C, U, B, W_Q, W_O and biases) or all.",
        choices=["attention", "all"],
    )
    optimizer: str = option(
        "muon",
        "muon (for hidden matrices; AdamW for the rest) or adamw.",
        choices=["muon", "adamw"],
    )
    muon_lr: float = option(
        5e-4,
        "Highest learning rate of Muon.",
        limits=[POSITIVE, at_most(FASTEST)],
        advanced=True,
    )
    adamw_lr: float = option(
        1e-4,
        "Highest learning rate of AdamW.",
        limits=[POSITIVE, at_most(FASTEST)],
        advanced=True,
    )
    adjust_lr: str = option(
        "match_rms_adamw",
        "Muon's update as large as one of AdamW's; or original.",
        choices=["match_rms_adamw", "original"],
        advanced=True,
    )
    momentum: float = option(0.95, "Muon's.", limits=[between(0, 1)], advanced=True)
    beta1: float = option(0.9, "AdamW's.", limits=[between(0, 1)], advanced=True)
    beta2: float = option(0.99, "AdamW's.", limits=[between(0, 1)], advanced=True)
    weight_decay: float = option(
        0.0,
        "Of both; it pulls away from the pretrained weights.",
        limits=[between(0, 1)],
        advanced=True,
    )
    warmup: float = option(
        0.05,
        "Share of the steps in which the learning rates rise.",
        limits=[between(0, 1)],
        advanced=True,
    )
    final_lr: float = option(
        0.1, "Share of them that half a cosine ends at.", limits=[between(0, 1)], advanced=True
    )
    clip: float = option(1.0, "Largest norm of the gradient.", limits=[POSITIVE], advanced=True)

    # how
    precision: str = option(
        "auto",
        "bf16 (autocast), fp32, or auto: bf16 where the hardware has it.",
        choices=["auto", "bf16", "fp32"],
        advanced=True,
    )
    gradient_checkpointing: bool = option(
        False, "Less memory, about a third more time.", advanced=True
    )
    validate_every: int = option(
        20, "Steps between validations.", limits=[at_least(1)], advanced=True
    )
    checkpoint_every: int = option(
        20, "Steps between checkpoints.", limits=[at_least(1)], advanced=True
    )
    keep: int = option(2, "Checkpoints kept.", limits=[at_least(1)], advanced=True)
    tracker: str = option(
        "auto",
        "trackio, tensorboard or none; auto: one that is installed.",
        choices=["auto", "none", "trackio", "tensorboard"],
        advanced=True,
    )

    def steps(self, tokens_per_example: float) -> int:
        """Steps on examples of so many tokens. Raises LrkvError where there is not one."""
        steps = int(self.tokens // (tokens_per_example * self.batch_size))
        if steps < 1:
            raise LrkvError(
                f"{self.tokens:,} tokens are less than one step of {self.batch_size} examples of"
                f" {tokens_per_example:,.0f}",
                "give more --tokens, or a smaller batch_size (of plain text, or seq_len)",
            )
        return steps

    def check(self) -> None:
        """Raise LrkvError for a value out of range, and for a batch that cannot be dealt out."""
        self.check_fields()
        if any(getattr(self, name) == 1 for name in FORGETS):
            raise LrkvError(
                "momentum, beta1 or beta2 is 1, which never forgets", "they must be smaller than 1"
            )
        if self.batch_size % self.micro_batch_size:
            raise LrkvError(
                f"a batch of {self.batch_size} windows does not divide into passes of"
                f" {self.micro_batch_size}",
                "let micro_batch_size divide batch_size",
            )

    def accumulation(self, processes: int) -> int:
        """Forward passes per step in each process. Raises LrkvError where the batch cannot be dealt
        out evenly.
        """
        passes, left = divmod(self.batch_size, self.micro_batch_size * processes)
        if left or not passes:
            raise LrkvError(
                f"a batch of {self.batch_size} windows does not divide among {processes} processes"
                f" in passes of {self.micro_batch_size}",
                "let processes times micro_batch_size divide batch_size",
            )
        return passes
