"""The hub: datasets come from it, converted folders go to it."""

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token

from ..errors import LrkvError, first_line
from .card import PICTURE, model_card, source_metadata
from .provenance import published
from .record import read_record
from .writer import RECORD


def rows(name: str, repository: str, *args, **kwargs) -> Iterator[dict]:
    """Rows of `datasets.load_dataset(repository, *args, **kwargs)`, streamed: of a large one no
    more is fetched than is read. name: what the user calls it. Raises LrkvError.
    """
    if importlib.util.find_spec("datasets") is None:
        raise LrkvError(
            f"to read the dataset {name}, `datasets` is needed",
            "pip install 'lrkv-convert[data]'; or give files",
        )
    from datasets import load_dataset

    try:
        yield from load_dataset(repository, *args, streaming=True, **kwargs)
    except Exception as error:  # the hub, the network and every file format raise their own
        raise LrkvError(
            f"cannot read the dataset {name}: {first_line(error)}",
            "write org/name:config:split, or give files",
        ) from error


def parts(name: str) -> tuple[str, str | None, str | None]:
    """ "org/name:config:split" -> (repository, config, split), None for what is not said."""
    repository, config, split = ([*name.split(":"), "", ""])[:3]
    return repository, config or None, split or None


def push(
    folder: Path,
    repository: str,
    *,
    private: bool = False,
    branch: str | None = None,
    message: str | None = None,
) -> str:
    """Upload a converted folder to `repository` ("org/name"), which is made if it is not there.
    Returns its address. Raises LrkvError.

    One commit. The card speaks of the model by its name there, and lrkv.json goes without the paths
    of this machine. The account is huggingface_hub's own (`hf auth login`, or HF_TOKEN).
    """
    if not (folder / RECORD).is_file() or not any(folder.glob("*.safetensors")):
        raise LrkvError(
            f"{folder} is no converted folder", "give one that lrkv convert or lrkv heal wrote"
        )
    record = read_record(folder)
    if get_token() is None:
        raise LrkvError("nobody is logged in to the hub", "hf auth login, or set HF_TOKEN")
    try:
        api = HfApi()
        made = api.create_repo(repository, private=private, exist_ok=True)
        if branch:
            api.create_branch(made.repo_id, branch=branch, exist_ok=True)
        card = model_card(
            record, source_metadata(folder), made.repo_id, picture=(folder / PICTURE).is_file()
        )
        rewritten = {
            RECORD: json.dumps(published(record).to_json(), indent=2, ensure_ascii=False),
            "README.md": card,
        }
        files = [
            file
            for file in sorted(folder.iterdir())
            if file.is_file()
            and not file.name.startswith(".")
            and file.suffix not in (".tmp", ".jsonl")
        ]
        api.create_commit(
            made.repo_id,
            [
                CommitOperationAdd(
                    file.name, rewritten[file.name].encode() if file.name in rewritten else file
                )
                for file in files
            ],
            commit_message=message or f"Upload {os.path.basename(os.path.abspath(folder))}",
            revision=branch,
        )
    # names, metadata, rights, the network: each raises its own, and the network's are another
    # library's
    except Exception as error:
        raise LrkvError(
            f"cannot upload to {repository}: {first_line(error)}",
            "write org/name, a name that is yours to write to",
        ) from error
    return str(made)
