"""The table of the README, generated so that it cannot say what the code does not do: python -m
lrkv_convert.families.table README.md
"""

import sys
from pathlib import Path

from ..modeling import attention_class
from .base import KINDS, Adapter, Family
from .decoder import DecoderAdapter
from .encoder_decoder import ENCODER_DECODERS
from .rows import DECODERS

HEAD = [
    "| family | such as | positions | norm of keys | refused | keys are read | on a GPU |",
    "|---|---|---|---|---|---|---|",
]


def readme_rows() -> list[str]:
    """Lines of Markdown: a row per family, decoders first."""
    return [*HEAD, *map(_decoder, DECODERS), *map(_encoder_decoder, ENCODER_DECODERS)]


def _decoder(adapter: DecoderAdapter) -> str:
    keys = (
        "rebuilt under RoPE"
        if "RoPE or" in adapter.positions
        else "rebuilt"
        if "RoPE" in adapter.positions
        else "in place"
    )
    with_norm = "kernel, split with the norm" if "LayerNorm" in adapter.norms else "kernel"
    path = (
        "split"
        if not attention_class(adapter.model_type).kernel
        else "kernel under RoPE"
        if "RoPE or" in adapter.positions
        else with_norm
    )
    return _row(
        adapter,
        adapter.norms,
        [refusal.what for refusal in adapter.refuses],
        keys,
        path,
    )


def _encoder_decoder(family: Family) -> str:
    kernel = attention_class(family.model_type).kernel
    paths = [f"{'kernel' if kind in kernel else 'split'} in {kind}-attention" for kind in KINDS]
    path = "kernel" if len(kernel) == len(KINDS) else ", ".join(paths)
    return _row(family.any, "none", ["a decoder alone"], "in place", path)


def _row(adapter: Adapter, norms: str, refused: list[str], keys: str, path: str) -> str:
    return (
        f"| `{adapter.model_type}` | {adapter.models} | {adapter.positions} | {norms} |"
        f" {', '.join(refused) or 'nothing'} | {keys} | {path} |"
    )


def write_into(readme: Path) -> None:
    """Put the table in the place of the one between its two comments."""
    before, rest = readme.read_text(encoding="utf-8").split("<!-- families", 1)
    comment, rest = rest.split("-->\n", 1)
    after = rest.split("<!-- end of families", 1)[1]
    readme.write_text(
        f"{before}<!-- families{comment}-->\n"
        + "\n".join(readme_rows())
        + f"\n<!-- end of families{after}",
        encoding="utf-8",
    )


if __name__ == "__main__":
    write_into(Path(sys.argv[1]))
