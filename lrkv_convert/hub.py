"""The hub: datasets come from it, converted folders go to it."""
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from .errors import LrkvError, first_line
from .writer import RECORD, WORK


def rows(name: str, repository: str, *args, **kwargs) -> Iterator[dict]:
    """Rows of `datasets.load_dataset(repository, *args, **kwargs)`, streamed: of a large one no more is fetched than is read. name: what the user
    calls it. Raises LrkvError."""
    if importlib.util.find_spec("datasets") is None:
        raise LrkvError(f"to read the dataset {name}, `datasets` is needed", "pip install 'lrkv-convert[data]'; or give files")
    from datasets import load_dataset
    try:
        yield from load_dataset(repository, *args, streaming=True, **kwargs)
    except Exception as error:          # the hub, the network and every file format raise their own
        raise LrkvError(f"cannot read the dataset {name}: {first_line(error)}", "write org/name:config:split, or give files") from error


def parts(name: str) -> tuple[str, str | None, str | None]:
    """"org/name:config:split" -> (repository, config, split), None for what is not said."""
    repository, config, split = (name.split(":") + ["", ""])[:3]
    return repository, config or None, split or None


def push(folder: Path, repository: str, *, private: bool = False, branch: str | None = None, message: str | None = None) -> str:
    """Upload a converted folder to `repository` ("org/name"), which is made if it is not there. Returns its address. Raises LrkvError.

    The account is huggingface_hub's own (`hf auth login`, or HF_TOKEN).
    """
    if not (folder / RECORD).is_file() or not any(folder.glob("*.safetensors")):
        raise LrkvError(f"{folder} is no converted folder", "give one that lrkv convert or lrkv heal wrote")
    try:
        api = HfApi()
        address = api.create_repo(repository, private=private, exist_ok=True)
        if branch:
            api.create_branch(repository, branch=branch, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, revision=branch, commit_message=message or f"Upload {folder.name}",
                          ignore_patterns=[f"{WORK}/*", "*.tmp", ".*"])
    except LocalTokenNotFoundError as error:
        raise LrkvError("nobody is logged in to the hub", "hf auth login, or set HF_TOKEN") from error
    except HFValidationError as error:
        raise LrkvError(f"{repository!r} is no name of a repository: {first_line(error)}", "write org/name") from error
    except (HfHubHTTPError, OSError) as error:
        raise LrkvError(f"cannot upload to {repository}: {first_line(error)}", "is the name yours to write to, and the network there?") from error
    return str(address)
