"""The table of the README, generated so that it cannot say what the code does not do."""
from .decoder import DecoderAdapter
from .encoder_decoder import ENCODER_DECODERS, EncoderDecoder
from .families import FAMILIES, PARTIAL

HEAD = ["| family | such as | positions | norm of keys | refused | keys are read | on a GPU |", "|---|---|---|---|---|---|---|"]


def readme_rows() -> list[str]:
    """Lines of Markdown: a row per family, decoders first."""
    return [*HEAD, *map(_decoder, FAMILIES), *map(_encoder_decoder, ENCODER_DECODERS.values())]


def _decoder(adapter: DecoderAdapter) -> str:
    keys = "rebuilt under RoPE" if "RoPE or" in adapter.positions else "rebuilt" if "RoPE" in adapter.positions else "in place"
    with_norm = "kernel, split with the norm" if "LayerNorm" in adapter.norms else "kernel"
    path = "split" if not adapter.kernel else "kernel under RoPE" if "RoPE or" in adapter.positions else with_norm
    return _row(adapter, adapter.norms, [refusal.what for refusal in adapter.refuses if refusal is not PARTIAL], keys, path)


def _encoder_decoder(family: EncoderDecoder) -> str:
    paths = [f"{'kernel' if adapter.kernel else 'split'} in {kind}-attention" for kind, adapter in family.kinds.items()]
    same = len({adapter.kernel for adapter in family.kinds.values()}) == 1
    return _row(family.any, "none", ["a decoder alone"], "in place", "kernel" if same else ", ".join(paths))


def _row(adapter: DecoderAdapter, norms: str, refused: list[str], keys: str, path: str) -> str:
    return f"| `{adapter.model_type}` | {adapter.models} | {adapter.positions} | {norms} | {', '.join(refused) or 'nothing'} | {keys} | {path} |"
