"""How a .gguf file says that RoPE is scaled, in the words of a transformers config: its own
reader leaves all of this out.

llama.cpp turns channel pair i at position p by p * theta^(-2i/d) / (s f_i): s is
`rope.scaling.factor`, f_i stands in the tensor rope_freqs.weight, into which its converter
computes llama3's scaling; YaRN (https://arxiv.org/abs/2309.00071) is as in transformers, with the
scale of attention 1 + 0.1 ln s times `attn_factor`; longrope has two tensors of f_i, for short
and for long texts, and `attn_factor`.
"""

import math

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..errors import LrkvError
from .gguf_header import Header

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
TENSORS = (FREQS, LONG, SHORT)
KEYS = {
    "type",
    "factor",
    "original_context_length",
    "attn_factor",
    "finetuned",
    "yarn_log_multiplier",
    "yarn_ext_factor",
    "yarn_attn_factor",
    "yarn_beta_fast",
    "yarn_beta_slow",
}
LLAMA3 = (
    {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },  # 3.1
    {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
)  # 3.2
EXACT = 1e-5  # relative: the divisors are stored in float32


def scale_rope(config: PreTrainedConfig, header: Header) -> None:
    """Put what `header` says of RoPE into `config`. Raises LrkvError for anything that cannot be
    said there exactly."""
    try:
        scaling = _scaling(config, header)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise _refusal(header, "makes no sense") from error
    if scaling is None:
        return
    now = getattr(config, "rope_parameters", None)
    if not isinstance(now, dict):
        raise _refusal(header, "belongs to a family without RoPE")
    if "full_attention" in now:  # Gemma 3: what is scaled is RoPE of the layers that see everything
        if scaling["rope_type"] != "linear":
            raise _refusal(header, "cannot be said of layers of two kinds")
        config.rope_parameters = {**now, "full_attention": {**now["full_attention"], **scaling}}
        return
    config.rope_parameters = {
        **{name: now[name] for name in ("rope_theta", "partial_rotary_factor") if name in now},
        **scaling,
    }
    if scaling["rope_type"] == "longrope" and hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = scaling["original_max_position_embeddings"]


def _scaling(config: PreTrainedConfig, header: Header) -> dict | None:
    prefix = f"{header.architecture}.rope.scaling."
    said = {
        key.removeprefix(prefix): value
        for key, value in header.keys.items()
        if key.startswith(prefix)
    }
    if unknown := sorted(said.keys() - KEYS):
        raise _refusal(header, f"has {prefix}{unknown[0]}, which is not known here")
    if any(said.get(key, 0) for key in ("yarn_log_multiplier",)) or said.get(
        "yarn_ext_factor", 1
    ) not in (1, -1):
        raise _refusal(header, "is a YaRN of its own kind")
    kind = said.get("type", "linear")
    factor = (
        float(said.get("factor") or header.value("rope.scale_linear") or 1)
        if kind != "none"
        else 1.0
    )  # 0: not scaled
    attention = float(said.get("attn_factor", 1)) * float(said.get("yarn_attn_factor", 1))
    reads = config.max_position_embeddings
    original = int(said.get("original_context_length") or reads)
    tensors = {name for name in TENSORS if name in header.tensors}
    if not (math.isfinite(factor) and factor > 0 and original > 0):
        raise _refusal(header, f"has the factor {factor:g}")
    if (
        tensors
        and kind == "yarn"
        or tensors & {LONG, SHORT}
        and (factor != 1 or len(tensors) != 2 or FREQS in tensors)
    ):
        raise _refusal(
            header, f"is of several kinds at once ({kind}, {', '.join(sorted(tensors))})"
        )
    if LONG in tensors:
        return {
            "rope_type": "longrope",
            "factor": max(1.0, reads / original),
            "original_max_position_embeddings": original,
            "attention_factor": attention,
            "short_factor": _checked(config, header, SHORT).tolist(),
            "long_factor": _checked(config, header, LONG).tolist(),
        }
    if kind == "yarn":
        betas = {
            name: float(said[f"yarn_{name}"])
            for name in ("beta_fast", "beta_slow")
            if f"yarn_{name}" in said
        }
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            **betas,
            "attention_factor": attention * (0.1 * math.log(factor) + 1 if factor > 1 else 1.0),
        }
    if kind not in ("linear", "none") or attention != 1:
        raise _refusal(
            header,
            f"is of the kind {kind}"
            + (f" with an attn_factor of {attention:g}" if attention != 1 else ""),
        )
    divisors = _checked(config, header, FREQS) * factor if tensors else torch.tensor([factor])
    if torch.allclose(divisors, divisors[:1].expand_as(divisors), rtol=EXACT):
        return (
            None
            if abs(divisors[0] - 1) <= EXACT
            else {"rope_type": "linear", "factor": divisors[0].item()}
        )
    return _from_divisors(config, divisors.double(), original)


def _checked(config: PreTrainedConfig, header: Header, name: str) -> Tensor:
    """Divisors (d/2,), one for each pair that turns."""
    found, pairs = (
        header.floats(name),
        len(_frequencies(config, {"rope_type": "linear", "factor": 1.0})),
    )
    if len(found) != pairs or not torch.isfinite(found).all() or (found <= 0).any():
        raise _refusal(
            header, f"has {len(found)} numbers in {name}, where {pairs} that are positive belong"
        )
    return found


def _frequencies(config: PreTrainedConfig, scaling: dict) -> Tensor:
    """(d/2,) as transformers computes them."""
    other = type(config)(
        **{**config.to_dict(), "rope_parameters": {**config.rope_parameters, **scaling}}
    )
    return ROPE_INIT_FUNCTIONS[scaling["rope_type"]](other, "cpu")[0].double()


def _from_divisors(config: PreTrainedConfig, divisors: Tensor, original: int) -> dict:
    """llama3's parameters, if some give these divisors (d/2,); else longrope, which takes any."""
    plain = _frequencies(config, {"rope_type": "linear", "factor": 1.0})
    gives = lambda scaling: torch.allclose(
        plain / _frequencies(config, scaling), divisors, rtol=EXACT
    )
    for parameters in (*LLAMA3, fitted_llama3(plain, divisors)):
        if parameters and gives(scaling := {"rope_type": "llama3", **parameters}):
            return scaling
    return {
        "rope_type": "longrope",
        "factor": 1.0,
        "original_max_position_embeddings": original,
        "attention_factor": 1.0,
        "short_factor": divisors.tolist(),
        "long_factor": divisors.tolist(),
    }


def fitted_llama3(plain: Tensor, divisors: Tensor, context: int = 8192) -> dict | None:
    """Parameters of llama3's scaling from its divisors (d/2,) of the frequencies `plain`, or
    None.

    Between the two bounds 1/divisor = (1 - s)/factor + s, where s = (context f / 2 pi - low) /
    (high - low) is a line in the frequency f: two points give it, and only it counts: context,
    low and high can be scaled together.
    """
    factor = divisors.max()
    share = (1 / divisors - 1 / factor) / (1 - 1 / factor)  # s
    between = (share > EXACT) & (share < 1 - EXACT)
    f, s = plain[between], share[between]
    if len(f) > 1:
        slope = (s.max() - s.min()) / (f.max() - f.min())
        start = f[0] - s[0] / slope  # where s = 0
    else:  # one point or none: any line that is 0 at the last pair below, and 1 at the first above
        below, above = plain[share <= EXACT], plain[share >= 1 - EXACT]
        if not len(below) or not len(above):
            return None
        low, high = below.max(), above.min()
        slope = (
            torch.maximum(s[0] / (f[0] - low), (1 - s[0]) / (high - f[0]))
            if len(f)
            else 1 / (high - low)
        )
        start = f[0] - s[0] / slope if len(f) else low
    if not (slope > 0 and start > 0):
        return None
    turns = context / (2 * math.pi)
    return {
        "factor": factor.item(),
        "low_freq_factor": (turns * start).item(),
        "high_freq_factor": (turns * (start + 1 / slope)).item(),
        "original_max_position_embeddings": context,
    }


def _refusal(header: Header, why: str) -> LrkvError:
    return LrkvError(
        f"{header.file}: its scaling of RoPE {why}",
        "convert the original folder instead of its GGUF",
    )
