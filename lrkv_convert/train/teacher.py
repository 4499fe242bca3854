"""The original that a converted model learns from: where it is, and whether it belongs to it."""

from collections.abc import Callable
from pathlib import Path

from ..errors import LrkvError
from ..evaluate.load import load_tokenizer, read_config
from ..families import Family, family_named
from ..format import Record
from .options import Options


def choose_loss(
    teacher: str | None, record: Record, options: Options, notice: Callable[[str], None]
) -> tuple[str | None, float]:
    """(the original, weight of KL in the loss). Raises LrkvError for a loss that wants a teacher
    where there is none.
    """
    named = record.source.path
    found = teacher or (named if named and Path(named).exists() else None)
    if found is None:
        refuse_loss(options, named)
        notice(
            f"the original is not at {named}: training on cross-entropy, without it (--teacher says"
            " where it is)"
        )
    weights = {"auto": 1.0 if found else 0.0, "kl": 1.0, "ce": 0.0, "mix": options.kl_weight}
    return found and absolute(found), weights[options.loss]


def refuse_loss(options: Options, named: str | None) -> None:
    """Raise LrkvError for a loss that wants the original, which is not where it was."""
    wanted = f"the loss {options.loss}" if options.loss in ("kl", "mix") else ""
    wanted = wanted or ("match_attention" if options.match_attention else "")
    if wanted:
        raise LrkvError(
            f"{wanted} needs the original model, and {named or 'it'} is no longer there",
            "give --teacher, or use loss: ce",
        )


def absolute(name: str) -> str:
    """A path that holds wherever the command is given again; ids of the hub as they are."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def check_teacher(teacher: str, family: Family, config, tokenizer) -> None:
    """Raise LrkvError for an original that reads other things, has another vocabulary, or another
    tokenizer.
    """
    theirs = read_config(teacher)
    check_reading(teacher, family, theirs)
    size = theirs.get_text_config().vocab_size
    if size != config.vocab_size:
        raise LrkvError(
            f"the teacher {teacher} has another vocabulary ({size} tokens, the student"
            f" {config.vocab_size})",
            "give the model that was converted",
        )
    try:
        other, own = load_tokenizer(teacher).get_vocab(), tokenizer.get_vocab()
    except LrkvError:
        return  # a teacher without one reads the student's tokens
    shared = other.keys() & own.keys()  # padding may differ
    if len(shared) < 0.9 * len(own) or any(other[token] != own[token] for token in shared):
        raise LrkvError(
            f"the tokenizer of the teacher {teacher} is another one than the student's",
            "give the model that was converted",
        )


def check_reading(teacher: str, family: Family, config) -> None:
    """Raise LrkvError for a teacher that reads other things than the student: speech, a text before
    it writes another, or the one text it goes on with.
    """
    named = family_named(config.model_type)
    encoder = bool(config.is_encoder_decoder) if named is None else named.encoder is not None
    speech = named is not None and named.speech
    if (encoder, speech) != (family.encoder is not None, family.speech):
        raise LrkvError(
            f"the teacher {teacher}, a {config.model_type}, reads other things than the student",
            "give the model that was converted",
        )
