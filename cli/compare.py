"""`lrkv compare` and `lrkv eval`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from .app import Command, app, quiet_libraries

Texts = Annotated[
    list[str] | None,
    typer.Option("--text", help="Text files to measure on, or folders of them; several."),
]
Audio = Annotated[
    list[str] | None,
    typer.Option(
        "--audio",
        help=(
            "Speech models: folders of .wav files (x.txt beside x.wav, or transcripts.tsv);"
            " several."
        ),
    ),
]
Pairs = Annotated[
    list[str] | None,
    typer.Option(
        "--pairs",
        help=(
            'Other encoder-decoders: .jsonl files of {"source": ..., "target": ...}, or texts;'
            " several."
        ),
    ),
]
Datasets = Annotated[
    list[str] | None,
    typer.Option(
        "--dataset",
        help="wikitext2 or c4 by the standard protocol, or org/name:config:split; several.",
    ),
]
SeqLen = Annotated[
    int | None,
    typer.Option(
        min=2, help="Window in tokens; windows do not overlap. Default: 512; 2048 with --dataset."
    ),
]
MaxTokens = Annotated[int | None, typer.Option(min=2, help="Read no more of each text than this.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Windows per forward pass.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
DType = Annotated[
    str, typer.Option(help="auto (as stored), float32, bfloat16, float16 or float64.")
]
Caches = Annotated[
    list[str] | None,
    typer.Option(
        "--cache",
        help="Also read every model from a quantised cache: fp8, int8, int4, int2; several.",
    ),
]
Prompts = Annotated[
    list[str] | None, typer.Option("--prompt", help="Let every model go on from this; several.")
]
Samples = Annotated[
    int | None,
    typer.Option(
        min=0,
        help=(
            "Let every model go on from so many passages of the first text. Default: 0; 3 with"
            " --report."
        ),
    ),
]
LongContext = Annotated[
    int | None,
    typer.Option(
        min=0,
        help=(
            "Passkeys hidden in up to so many tokens, and loss by position up to there. 0: as many"
            " as the models read."
        ),
    ),
]
Retrieval = Annotated[
    list[int] | None,
    typer.Option(
        "--retrieval",
        min=1,
        help=(
            "Things hidden in texts of so many tokens, each asked for (tasks after RULER): how many"
            " are found, and the loss of the answers; several lengths."
        ),
    ),
]
RetrievalTexts = Annotated[int, typer.Option(min=1, help="Texts of each retrieval task.")]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks", help="Tasks of lm-eval: arc_easy, mmlu, gsm8k, ...; several, or one,two,three."
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Examples per task.")]
TaskFolder = Annotated[
    Path | None, typer.Option(help="Folder with tasks of your own, as lm-eval's YAML.")
]
GeneratedCode = Annotated[
    bool,
    typer.Option(
        "--run-generated-code",
        help="Allow tasks that run what a model writes (humaneval) on this machine.",
    ),
]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")]
Card = Annotated[
    bool,
    typer.Option(
        "--card", help="Also write what was measured into the model cards of the converted folders."
    ),
]
Report = Annotated[
    Path | None,
    typer.Option("--report", help="Also write one HTML page with tables, pictures and commands."),
]


@app.command(cls=Command)
def compare(
    base: Annotated[str, typer.Argument(help="The original model: folder, .gguf file or hub id.")],
    others: Annotated[
        list[str], typer.Argument(help="Models to compare with it: converted, healed, any.")
    ],
    text: Texts = None,
    dataset: Datasets = None,
    seq_len: SeqLen = None,
    max_tokens: MaxTokens = None,
    batch_size: BatchSize = 1,
    device: Device = "auto",
    dtype: DType = "auto",
    cache: Caches = None,
    prompt: Prompts = None,
    samples: Samples = None,
    long_context: LongContext = None,
    retrieval: Retrieval = None,
    retrieval_texts: RetrievalTexts = 5,
    tasks: Tasks = None,
    limit: Limit = None,
    task_folder: TaskFolder = None,
    run_generated_code: GeneratedCode = False,
    audio: Audio = None,
    pairs: Pairs = None,
    json_file: Json = None,
    report: Report = None,
    card: Card = False,
) -> None:
    """Perplexity, KL, agreement and cache of models beside their original; at length, on tasks and
    in words if asked.
    """
    chosen = [t for given in tasks or [] for t in given.split(",") if t.strip()]
    if tasks and not chosen:
        raise typer.BadParameter("no task is named", param_hint="--tasks")
    measure(
        [base, *others],
        text,
        dataset,
        seq_len,
        max_tokens,
        batch_size,
        device,
        dtype,
        json_file,
        report,
        card,
        caches=cache or [],
        prompts=prompt or [],
        samples=(3 if report else 0) if samples is None else samples,
        long_context=long_context,
        retrieval=retrieval or [],
        retrieval_texts=retrieval_texts,
        tasks=chosen,
        limit=limit,
        task_folder=task_folder,
        generated_code=run_generated_code,
        audio=audio or [],
        pairs=pairs or [],
    )


@app.command("eval", cls=Command)
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder, .gguf file or hub id.")],
    text: Texts = None,
    dataset: Datasets = None,
    seq_len: SeqLen = None,
    max_tokens: MaxTokens = None,
    batch_size: BatchSize = 1,
    device: Device = "auto",
    dtype: DType = "auto",
    audio: Audio = None,
    pairs: Pairs = None,
    json_file: Json = None,
) -> None:
    """Perplexity and cache of one model; of an encoder-decoder also its word error rate."""
    measure(
        [model],
        text,
        dataset,
        seq_len,
        max_tokens,
        batch_size,
        device,
        dtype,
        json_file,
        audio=audio or [],
        pairs=pairs or [],
    )


def measure(
    models: list[str],
    text: list[str] | None,
    dataset: list[str] | None,
    seq_len: int | None,
    max_tokens: int | None,
    batch_size: int,
    device: str,
    dtype: str,
    json_file: Path | None,
    report: Path | None = None,
    card: bool = False,
    audio: Sequence[str] = (),
    pairs: Sequence[str] = (),
    **more,
) -> None:
    quiet_libraries()
    from lrkv_convert import LrkvError
    from lrkv_convert.device import pick_device, pick_dtype
    from lrkv_convert.evaluate import compare as run
    from lrkv_convert.evaluate.corpora import gather, gather_pairs
    from lrkv_convert.evaluate.load import read_config, refuse_encoder
    from lrkv_convert.folder.companions import add_evaluation
    from lrkv_convert.folder.markup import quoted
    from lrkv_convert.folder.places import check_file, writing
    from lrkv_convert.folder.provenance import calibrated_on
    from lrkv_convert.folder.record import read_record
    from lrkv_convert.folder.writer import RECORD, write_json

    from . import display

    json_file, report = (
        file and check_file(file, option)
        for file, option in ((json_file, "--json"), (report, "--report"))
    )
    if json_file and json_file == report:
        raise LrkvError(f"--json and --report are the same file, {report}", "give each its own")
    if report:
        try:
            from lrkv_convert.evaluate.page import write_page
        except ImportError as error:
            raise LrkvError(
                "the report has pictures, for which matplotlib is needed",
                "pip install 'lrkv-convert[plot]'",
            ) from error
    cards = [
        folder
        for folder in (Path(model).expanduser() for model in models[1:])
        if (folder / RECORD).is_file()
    ]
    for folder in cards:
        read_record(folder)  # what is wrong with it is told before hours of measuring
    if card and not cards:
        raise LrkvError(
            "none of these is a converted folder, whose model card --card writes",
            "give one that lrkv convert or lrkv heal wrote",
        )
    for folder in cards if card else ():
        check_file(folder / "README.md", "--card")
    if audio or pairs:
        given = {"--text": text, "--dataset": dataset, "--seq-len": seq_len, "--report": report}
        if others := [option for option, value in given.items() if value]:
            raise LrkvError(f"{others[0]} does not go with --audio and --pairs", "leave it out")
        texts = gather_pairs(models[0], audio, pairs)
    else:
        if not (text or dataset):  # the hint to give a text would lead nowhere
            refuse_encoder(models[0], read_config(models[0]))
        texts, more["seq_len"] = gather(text or [], dataset or [], seq_len, max_tokens)
    with display.progress() as progress:
        result = run(
            models,
            texts,
            max_tokens=max_tokens,
            batch_size=batch_size,
            device=pick_device(device),
            dtype=pick_dtype(dtype),
            progress=progress,
            **more,
        )
    display.show_comparison(result)  # first of all: what comes now may fail
    for folder in cards:
        if known := [t["name"] for t in result["texts"] if t["sha256"] in calibrated_on(folder)]:
            display.say(
                f"{folder.name} was calibrated on {', '.join(known)}: that says little about"
                " anything else"
            )
    if json_file:
        with writing(json_file):
            write_json(json_file, result)
    if report:
        with writing(report):
            write_page(result, report, quoted(["lrkv", *sys.argv[1:]]))
    for folder in cards if card else ():
        with writing(folder):
            add_evaluation(folder, result)
    if written := [
        *filter(None, (json_file, report)),
        *(folder / "README.md" for folder in cards if card),
    ]:
        print()
        display.say("written: " + ", ".join(map(str, written)))
