"""The data of a run: read and packed by the main process, once, for all processes and for every
time the run is resumed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import LrkvError
from ..evaluate.load import load_model, load_tokenizer, read_config
from ..examples.material import gather
from ..examples.pairs import Corpus
from ..examples.reader import Reader
from ..families import Family
from ..modeling import auto_class
from ..source import open_folder
from .data import Data
from .options import Options
from .pairs import Filler, fill, filled
from .run import Run
from .teacher import check_teacher
from .windows import pack, packed

Found = TypeVar("Found", bound=Data)


@dataclass
class Reading:
    """What is asked of the data. model: the converted folder; teacher: the original, or None;
    stage: called with what is being done.
    """

    model: Path
    family: Family
    data: list[str]
    teacher: str | None
    options: Options
    stage: Callable[[str], None] = lambda name: None
    config: PreTrainedConfig = field(init=False)

    def __post_init__(self):
        self.config = read_config(str(self.model))

    def read(self, run: Run) -> Data:
        """The data of this run, made by the main process if it is not there yet. Raises LrkvError,
        also for tokenizers that differ.
        """
        tokenizer, options = load_tokenizer(str(self.model)), self.options
        if self.family.encoder is None:
            self.check_length()
        if self.teacher is not None:
            check_teacher(self.teacher, self.family, self.config, tokenizer)
        if self.family.encoder is not None:
            if options.retrieval:
                raise LrkvError("retrieval texts are for decoders", "leave retrieval out")
            return made(run, filled, lambda: self.fill(run, tokenizer))
        return made(
            run,
            packed,
            lambda: pack(
                self.data,
                tokenizer,
                run.work,
                seq_len=options.seq_len,
                tokens=options.tokens,
                validation=options.validation,
                validation_tokens=options.validation_tokens,
                field=options.text_field,
                seed=options.seed,
                vocabulary=self.config.vocab_size,
                retrieval=options.retrieval,
            ),
        )

    def check_length(self) -> None:
        """Raise LrkvError for windows that the model cannot read."""
        limit = getattr(self.config, "max_position_embeddings", None)
        if limit is not None and self.options.seq_len > limit:
            raise LrkvError(
                f"windows of {self.options.seq_len} tokens are longer than {self.model} can read"
                f" ({limit})",
                "give a smaller seq_len",
            )

    def fill(self, run: Run, tokenizer) -> None:
        """Examples of an encoder-decoder. What nobody has written, the original writes or, where it
        is gone, the converted model.
        """
        options, held = self.options, self.options.validation
        generation = open_folder(self.model, str(self.model), self.config).generation_config()
        reader = Reader(self.model, self.family, tokenizer, self.config, generation)
        fill(
            self.corpora(self.data),
            self.corpora(held) if held else None,
            Filler(run.work, reader, Writer(self, run.accelerator.device)),
            tokens=options.tokens,
            validation_tokens=options.validation_tokens,
            seed=options.seed,
        )

    def corpora(self, data: list[str]) -> list[Corpus]:
        """What an encoder-decoder reads. Raises LrkvError."""
        if not data:
            raise LrkvError("there is nothing to train on", "give --data")
        return gather(data, self.options.tokens, self.family).corpora


class Writer:
    """Makes the model that writes what nobody has written, once, when it is first asked for."""

    def __init__(self, reading: Reading, device: torch.device):
        self.reading, self.device = reading, device
        self.model: PreTrainedModel | None = None

    def __call__(self) -> PreTrainedModel:
        if self.model is None:
            asked = self.reading
            asked.stage("writing what is missing")
            name, auto = asked.teacher or str(asked.model), auto_class(asked.family.model_type)
            self.model = load_model(name, self.device, torch.float32, auto)
        return self.model


def made(run: Run, find: Callable[[Path], Found | None], make: Callable[[], None]) -> Found:
    """What `find` finds in the run's folder, made there by the main process if it is not there yet.
    Raises LrkvError.
    """
    if run.accelerator.is_main_process and find(run.work) is None:
        try:
            make()
        except (OSError, SafetensorError) as error:
            raise LrkvError(
                f"cannot write {run.work}: {getattr(error, 'strerror', None) or error}",
                "check permissions and free space",
            ) from error
    run.accelerator.wait_for_everyone()
    if (found := find(run.work)) is None:
        raise LrkvError(
            f"this process does not see {run.work}", "all nodes must share the folder of --out"
        )
    return found
