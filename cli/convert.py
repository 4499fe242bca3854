"""`lrkv convert`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .app import Command, app, quiet_libraries


@app.command(cls=Command)
def convert(
    model: Annotated[
        str, typer.Argument(help="Folder, .gguf file or hub id of the model to convert.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    cache_ratio: Annotated[
        float | None,
        typer.Option(
            help=(
                "Share of the original cache, spent where the loss minds most. Default: 0.5, with"
                " --keys full 0.75."
            )
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(help="Instead: the same residual rank of keys and values in every layer."),
    ] = None,
    rank_k: Annotated[int | None, typer.Option(help="Residual rank of keys.")] = None,
    rank_v: Annotated[int | None, typer.Option(help="Residual rank of values.")] = None,
    base_width: Annotated[
        int | None,
        typer.Option(
            help="With --rank: width of the shared base. Default: one head; 0: one latent per head."
        ),
    ] = None,
    base_width_k: Annotated[int | None, typer.Option(help="Base width of keys.")] = None,
    base_width_v: Annotated[int | None, typer.Option(help="Base width of values.")] = None,
    max_width_k: Annotated[
        int | None,
        typer.Option(
            help="With --cache-ratio: widest base of keys. Default: one head under RoPE, else four."
        ),
    ] = None,
    max_width_v: Annotated[
        int | None,
        typer.Option(help="With --cache-ratio: widest base of values. Default: four heads."),
    ] = None,
    keys: Annotated[
        str | None,
        typer.Option(
            help=(
                "How RoPE keys are cached: joint (default; best quality), per-head or rotary (less"
                " to rebuild when "
                "read), full (as they are: only values are compressed)."
            )
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help=(
                "joint (default), aligned (C = I after a gauge), mean; pooled and grouped, to"
                " compare with."
            )
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="Norm of the fit: fisher (default), attention, whitened or plain."),
    ] = None,
    refit: Annotated[
        bool | None,
        typer.Option(
            "--refit/--no-refit", help="Correct W_O in closed form after the fit (default), or not."
        ),
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(
            help=(
                "Which attention of an encoder-decoder's decoder: self, cross, or self,cross"
                " (default there); each has a cache and "
                "a budget of its own. Decoder-only models have self alone."
            )
        ),
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            help="Text files or folders, several; self for text sampled from the model; none for "
            "the weights alone. Default: a text that ships with the package. Encoder-decoders:"
            " .jsonl files of "
            '{"source": ..., "target": ...} (without a target, what the model writes itself), or'
            " texts, whose paragraphs are "
            "sources; speech models: folders of .wav files, transcripts in x.txt beside x.wav or in"
            " transcripts.tsv."
        ),
    ] = None,
    calibration_tokens: Annotated[
        int | None,
        typer.Option(
            help=(
                "Tokens of calibration text. Default: 32768 of the text that ships here, 16384 of"
                " yours; of an "
                "encoder-decoder's sources 16384, of what is said 4096."
            )
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="auto (the source's, default), float32, bfloat16, float16 or float64."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    max_shard_size: Annotated[
        str | None, typer.Option(help="Largest safetensors file. Default: 5GB.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Options from a shipped recipe or a YAML file; flags override it."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier converted folder.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Allow ranks that do not shrink the cache.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and write nothing.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the record as JSON instead of a table.")
    ] = False,
) -> None:
    """Convert a pretrained model to LRKV attention and write a folder that transformers loads."""
    quiet_libraries()
    from lrkv_convert import convert as run
    from lrkv_convert.settings.recipe import load_recipe

    from . import display

    flags = {
        "cache_ratio": cache_ratio,
        "rank": rank,
        "rank_k": rank_k,
        "rank_v": rank_v,
        "base_width": base_width,
        "base_width_k": base_width_k,
        "base_width_v": base_width_v,
        "max_width_k": max_width_k,
        "max_width_v": max_width_v,
        "keys": keys,
        "base": base,
        "metric": metric,
        "refit": refit,
        "attention": attention,
        "calibration": calibration,
        "calibration_tokens": calibration_tokens,
        "dtype": dtype,
        "max_shard_size": max_shard_size,
        "force": force or None,
    }
    options = load_recipe(recipe, "convert", set(flags)) if recipe else {}
    options |= {name: value for name, value in flags.items() if value is not None}
    with display.progress() as progress:
        done = run(
            model,
            out,
            device=device,
            overwrite=overwrite,
            dry_run=dry_run,
            recipe=recipe,
            progress=progress,
            **options,
        )
    display.show_notices(done.notices)
    if as_json:
        planned = {kind: plan.as_dict() for kind, plan in done.plans.items()}
        print(json.dumps(done.record.to_json() if done.record else planned, indent=2))
    elif done.record is None:
        display.show_plan(done.plans, model)
    else:
        display.show_conversion(done.record, model, out)
