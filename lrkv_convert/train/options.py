"""What a user may ask of healing: the fields of a recipe (recipes/heal/*.yaml), one by one. Checked
before anything is loaded.
"""

import math
from dataclasses import dataclass

from ..errors import LrkvError
from ..settings.fields import Typed

CHOICES = {
    "loss": ("auto", "kl", "ce", "mix"),
    "train": ("attention", "all"),
    "optimizer": ("muon", "adamw"),
    "adjust_lr": ("match_rms_adamw", "original"),
    "precision": ("auto", "bf16", "fp32"),
    "tracker": ("auto", "none", "trackio", "tensorboard"),
}

FASTEST = 1000  # of learning rates: far beyond any that is of use


@dataclass(frozen=True)
class Options(Typed):
    """How to heal. The defaults are the recipe `short`. Raises LrkvError for a value of the wrong
    type.

    What is read. tokens: to train on, in all; seq_len: tokens per window; batch_size: windows per
    optimiser step, over all processes; micro_batch_size: windows per forward pass of one process
    (what does not fit in one pass is accumulated); seed: of the order of the windows; text_field:
    where the text stands in jsonl, parquet and datasets; validation_tokens: held out of the data,
    or read from `validation` where that is given (text files).

    What is minimised. loss: "kl", the divergence of the student from the teacher's next-token
    distribution; "ce", next-token cross-entropy; "mix", kl_weight of the first and the rest of the
    second; "auto", kl where there is a teacher and ce where there is none. match_attention: weight
    of the relative squared error of each layer's attention output beside that of the teacher (0:
    none).

    What is trained. train: "attention" (W_shared, C, U, B, their biases, W_Q and W_O) or "all".
    optimizer: "muon" (Muon for hidden matrices, AdamW for the rest; train/optimise.py says which is
    which) or "adamw" for all. muon_lr, adamw_lr: highest learning rates; adjust_lr, momentum:
    Muon's; beta1, beta2: AdamW's; weight_decay: of both; warmup: share of the steps in which the
    learning rate rises; final_lr: share of it that the cosine ends at; clip: largest norm of the
    gradient.

    How. precision: "bf16" (autocast; weights stay float32), "fp32", or "auto": bf16 where the
    hardware multiplies it faster; gradient_checkpointing: less memory, more time; validate_every,
    checkpoint_every: steps; keep: checkpoints kept; tracker: "auto" takes trackio or TensorBoard if
    one of them is installed.
    """

    tokens: int = 200_000
    seq_len: int = 512
    batch_size: int = 4
    micro_batch_size: int = 1
    seed: int = 0
    text_field: str = "text"
    validation: list[str] | None = None
    validation_tokens: int = 8192
    loss: str = "auto"
    kl_weight: float = 0.5
    match_attention: float = 0.0
    train: str = "attention"
    optimizer: str = "muon"
    muon_lr: float = 5e-4
    adamw_lr: float = 1e-4
    adjust_lr: str = "match_rms_adamw"
    momentum: float = 0.95
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.0
    warmup: float = 0.05
    final_lr: float = 0.1
    clip: float = 1.0
    precision: str = "auto"
    gradient_checkpointing: bool = False
    validate_every: int = 20
    checkpoint_every: int = 20
    keep: int = 2
    tracker: str = "auto"

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
        """Raise LrkvError for a value out of range."""
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise LrkvError(
                    f"unknown {name} {getattr(self, name)!r}", f"choose from {', '.join(known)}"
                )
        for name in (
            "tokens",
            "seq_len",
            "batch_size",
            "micro_batch_size",
            "validation_tokens",
            "validate_every",
            "checkpoint_every",
            "keep",
        ):
            if getattr(self, name) < 1 + (name == "seq_len"):
                raise LrkvError(
                    f"{name} is {getattr(self, name)}",
                    f"it must be at least {1 + (name == 'seq_len')}",
                )
        for name, low, high in (
            ("kl_weight", 0, 1),
            ("match_attention", 0, math.inf),
            ("weight_decay", 0, 1),
            ("warmup", 0, 1),
            ("final_lr", 0, 1),
            ("momentum", 0, 1),
            ("beta1", 0, 1),
            ("beta2", 0, 1),
        ):
            if not (low <= getattr(self, name) <= high and math.isfinite(getattr(self, name))):
                raise LrkvError(
                    f"{name} is {getattr(self, name)}",
                    (
                        f"it must lie between {low} and {high}"
                        if high < math.inf
                        else f"it must be at least {low}"
                    ),
                )
        for name in ("muon_lr", "adamw_lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise LrkvError(f"{name} is {getattr(self, name)}", "it must be positive")
            # float32 ends, in errors of its own
            if name != "clip" and getattr(self, name) > FASTEST:
                raise LrkvError(
                    f"{name} is {getattr(self, name)}", f"it must be at most {FASTEST:,}"
                )
        if not 0 <= self.seed < 2**31:
            raise LrkvError(f"seed is {self.seed}", "it must lie between 0 and 2147483647")
        if max(self.momentum, self.beta1, self.beta2) == 1:
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
