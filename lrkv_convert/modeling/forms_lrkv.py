"""Forms of keys other than the joint one of factors_lrkv.py: each a class that says only how it
differs. Travels with every converted checkpoint. Their twins in the library, which fit and plan
them, are in lrkv_convert/forms.

Shapes as in factors_lrkv.py. This file may import torch, transformers and its siblings only.
"""

from .factors_lrkv import LowRankHeads, rotate


class RotaryHeads(LowRankHeads):
    """The base lies in the cache after rotation (C = I: it passes through RoPE as it is), the
    residual before.
    """

    form = "rotary"
    has_maps = False
    caches_rotated = True

    def __init__(self, width, num_heads, head_dim, base_width, rank, alignment, bias):
        super().__init__(width, num_heads, head_dim, base_width, rank, alignment, bias)
        if alignment:
            self.refuse(alignment)

    def encode(self, x, rotation=None, norm=None):
        base, residual = super().encode(x)
        return base if self.W_shared is None else rotate(base, rotation), residual

    def rebuild(self, cached, rotation=None, norm=None):
        base, residual = cached
        own = self._finished(None, residual, rotation, norm)
        if self.W_shared is None:
            return own
        return (base if own is None else base + own).expand(-1, self.num_heads, -1, -1)

    def _turned(self, base, rotation):
        return base


class FullHeads(LowRankHeads):
    """The keys themselves lie in the cache, normalised and rotated, as residuals of rank d without
    B: nothing to rebuild.
    """

    form = "full"
    rotates_on_read, caches_rotated = False, True

    def __init__(self, width, num_heads, head_dim, base_width, rank, alignment, bias):
        super().__init__(width, num_heads, head_dim, base_width, rank, alignment, bias)
        if (base_width, rank) != (0, head_dim):
            self.refuse(alignment)
        self.B = None

    def encode(self, x, rotation=None, norm=None):
        base, heads = super().encode(x)
        heads = heads if self.bias is None else heads + self.bias.unsqueeze(1)
        heads = heads if norm is None else norm(heads)
        return base, heads if rotation is None else rotate(heads, rotation)

    def rebuild(self, cached, rotation=None, norm=None):
        return cached[1]

    def read_as_is(self, rotation, norm):
        return True

    def absorb(self, query):
        return [None, query]

    def expand_averages(self, averages):
        return averages[1]


FORMS: dict[str, type[LowRankHeads]] = {
    form.form: form for form in (LowRankHeads, RotaryHeads, FullHeads)
}


def low_rank_heads(
    config,
    layer_idx: int,
    side: str,
    bias: bool,
    name: str = "lrkv",
    width: int | None = None,
    heads: int | None = None,
    head_dim: int | None = None,
) -> LowRankHeads:
    """The keys' or values' module of one layer, from the field `name` of the config. width D, heads
    H, head_dim d: as the config says, unless given.

    config.lrkv = {"keys": {"base_width": [m per layer], "rank": [r per layer], "alignment": bool,
    "form": str}, "values": {...}}, and lists of what a form has `found`.
    """
    field = getattr(config, name, None)
    if field is None:
        raise ValueError(
            f"{type(config).__name__} has no `{name}` field: it must give base widths and ranks per"
            " layer"
        )
    spec, width = field[side], width or config.hidden_size
    heads = heads or getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = (
        head_dim
        or getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads
    )
    form = FORMS[spec.get("form", "joint")]
    return form(
        width,
        heads,
        head_dim,
        spec["base_width"][layer_idx],
        spec["rank"][layer_idx],
        spec["alignment"],
        bias,
        **{name: spec[name][layer_idx] for name in form.found if name in spec},
    )
