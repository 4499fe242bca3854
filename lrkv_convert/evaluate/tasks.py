"""Accuracy on the tasks of EleutherAI's lm-evaluation-harness (Gao et al. 2024): its `hf` backend
takes a converted model as it is.
"""

import logging
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import LrkvError, first_line


def task_manager(names: list[str], folder: Path | None):
    """lm-eval's index of tasks, with those of `folder`. Raises LrkvError without lm-eval, and for a
    name that it does not know.
    """
    if folder is not None and not folder.is_dir():
        raise LrkvError(f"no such folder of tasks: {folder}", "give one that holds YAML files")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise LrkvError(
            "tasks are run by lm-eval, which is not installed", "pip install 'lrkv-convert[eval]'"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=str(folder) if folder else None)
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise LrkvError(
            f"lm-eval knows no task {unknown[0]!r}",
            "lm-eval ls tasks lists them; your own go to --task-folder",
        )
    return manager


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: list[str],
    manager,
    *,
    limit: int | None = None,
    batch_size: int = 1,
    generated_code: bool = False,
) -> list[dict]:
    """One row per task and metric: {"task", "metric", "value", "stderr", "samples"}. Raises
    LrkvError.

    manager: `task_manager` of these names; limit: examples per task; generated_code: allow tasks
    that run what the model writes (humaneval, mbpp) on this machine.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    run: Any = simple_evaluate  # decorators hide the arguments of both
    backend: Any = HFLM
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if generated_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    try:
        found = run(
            backend(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=names,
            limit=limit,
            task_manager=manager,
            log_samples=False,
            confirm_run_unsafe_code=generated_code,
            bootstrap_iters=1000,
        )
    # datasets that are not there, tasks that are broken: each raises its own
    except Exception as error:
        raise LrkvError(
            f"lm-eval failed on {', '.join(names)}: {first_line(error)}",
            "is its dataset at hand? without a network it must be in the cache",
        ) from error
    rows = []
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if isinstance(value, int | float) and "_stderr" not in metric and filtered:
                error = metrics.get(f"{metric}_stderr,{filtered}")
                rows.append(
                    {
                        "task": task,
                        "metric": metric if filtered == "none" else f"{metric}, {filtered}",
                        "value": value,
                        "stderr": error if isinstance(error, int | float) else None,
                        "samples": found.get("n-samples", {}).get(task, {}).get("effective"),
                    }
                )
    return rows
