"""Forms of keys whose codes are read without rebuilding anything, or a head at most: channels,
commuting, per-head. Exact where nothing is rounded or dropped, and the same however they are cached
and read.
"""

import itertools

import pytest
import torch
from conftest import prompt, refused, relative, uneven
from safetensors import safe_open
from test_caches import GREEDY, load, steps, whole
from transformers import DynamicCache, StaticCache

from lrkv_convert import convert, read_folder
from lrkv_convert.evaluate.memory import cache_bytes, formula_bytes
from lrkv_convert.families import Geometry
from lrkv_convert.fit.codes import DISTORTION, WIDTHS, Spread
from lrkv_convert.fit.metric import Metric, rotation_average, square_root
from lrkv_convert.forms import FORMS, Shape
from lrkv_convert.forms.channels import quietest_angle
from lrkv_convert.modeling import forms_lrkv
from lrkv_convert.modeling.codes_lrkv import Codes
from lrkv_convert.modeling.factors_lrkv import LowRankHeads, rotate

EXACT = 1e-9
H, G, D, d = 3, 2, 48, 20
# form -> how many channels of a head turn
TURNING = {
    "channels": (20, 8, 0),
    "commuting": (20,),
    "per-head": (20, 8, 0),
    "ranks": (20, 8),  # per-head keys with a scale for each head
    "joint": (20,),
}
CASES = [(form, n) for form, turning in TURNING.items() for n in turning]


def drawn(seed: int = 0):
    """draw(*shape): normal numbers of their own, float64."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


class Problem:
    """Keys of one layer: W (H, D, d) and b, inputs x (T, D), the first a sink, and a metric that
    knows how the others lie. alike: whether RoPE leaves the metric alone.
    """

    def __init__(self, turning: int, alike: bool = False, seed: int = 0, H: int = H):
        draw = drawn(seed)
        self.W, self.b = draw(H, D, d), draw(H, d)
        mix = draw(D, D) * torch.logspace(0, -2, D, dtype=torch.float64)
        usual, first = draw(400, D) @ mix + draw(D), 100 * draw(D)
        mean = usual.mean(0)
        covariance = (usual - mean).T @ (usual - mean) / len(usual)
        M = draw(H, d, d)
        M = rotation_average(M @ M.mT, turning) if alike else M @ M.mT
        shares = torch.ones(H, dtype=torch.float64)
        spread = Spread(mean, first, covariance, shares)
        self.metric = Metric(covariance, square_root(M), None, spread, shares)
        self.geometry = Geometry(D, H, G, d, rotary_dim=turning)
        self.x = torch.cat((first.unsqueeze(0), usual))
        self.rotation = None
        if turning:
            at = torch.arange(len(self.x))[:, None] / 7
            angles = at * 100.0 ** (-torch.arange(turning // 2) / (turning // 2)).double()
            angles = torch.cat((angles, angles), dim=-1).unsqueeze(0)
            self.rotation = angles.cos(), angles.sin()

    def keys(self) -> torch.Tensor:
        """(1, H, T, d), rotated."""
        keys = (torch.einsum("td,hde->hte", self.x, self.W) + self.b.unsqueeze(1)).unsqueeze(0)
        return keys if self.rotation is None else rotate(keys, self.rotation)

    def fitted(self, form: str, kept: int, bits: int = 8, groups: int = 1) -> tuple:
        """The fit in which so many channels, or latents (of a group of heads), or latents of a
        head, have so many bits, and the module that a converted model would have.
        """
        blocks, ranks = ((bits, kept),), form == "ranks"
        form = "per-head" if ranks else form
        shape = Shape(0 if ranks else kept, kept if ranks else 0, form)
        codes = (None, blocks) if ranks else (blocks, None)
        shape = Shape(shape.width, shape.rank, form, codes, groups)
        fit = FORMS[form].fit(self.W, self.b, self.metric, shape, self.geometry, "joint")
        config = FORMS[form].config([shape], "joint")
        heads = forms_lrkv.FORMS[config["form"]](
            D,
            len(self.W),
            d,
            shape.width,
            shape.rank,
            True,
            True,
            codes=shape.codes,
            **({"groups": groups} if groups > 1 else {}),
            **fit.found,
        )
        heads.double().load_state_dict(fit.tensors)
        return heads.requires_grad_(False), fit


def unrounded(heads, x: torch.Tensor, rotation: tuple | None = None) -> tuple:
    """What `encode` would give of (1, T, D), were nothing rounded: latents and the mark of
    sinks.
    """
    found = []
    for z, coder in zip(heads.project(x), heads.coders):
        if coder is not None:
            sink = coder.codes(z)[1] < 0
            usual, first = (z - centre.unsqueeze(1) for centre in coder.centres)
            about = torch.where(sink, first, usual)
            if rotation is not None and heads.form == "turning":
                about = heads.turned(about, rotation)
            z = torch.cat((about, sink.to(z.dtype)), dim=-1)
        found.append(z)
    return tuple(found)


def whole_of(form: str) -> int:
    return d if form == "ranks" else H * d


def as_keys(rebuilt: torch.Tensor, fit) -> torch.Tensor:
    """What queries that absorbed the gauge make of keys."""
    return rebuilt if fit.gauge is None else rebuilt @ fit.gauge


@pytest.mark.parametrize("form, turning", CASES)
def test_all_of_it_is_the_keys_but_for_rounding(form, turning, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # `codes` works in float32
    problem = Problem(turning)
    heads, fit = problem.fitted(form, whole_of(form))
    x, keys, size = problem.x.unsqueeze(0), problem.keys(), problem.keys().abs().max()
    exact = heads.rebuild(unrounded(heads, x, problem.rotation), problem.rotation)
    # the joint form drops what is smaller than rounding of a root
    assert (as_keys(exact, fit) - keys).abs().max() < (1e-6 if form == "joint" else EXACT) * size
    assert relative(as_keys(heads.matrices(), fit), problem.W) < (
        1e-7 if form == "joint" else EXACT
    )
    read = heads.rebuild(heads.encode(x, problem.rotation), problem.rotation)
    off = (as_keys(read, fit) - keys).norm() / keys.norm()
    assert 1e-4 < off < 0.01


@pytest.mark.parametrize("kept", [24, 56])
@pytest.mark.parametrize("form, turning", CASES)
def test_queries_meet_the_keys_that_are_rebuilt(form, turning, kept):
    kept = 8 if form == "ranks" else kept
    problem, draw = Problem(turning), drawn(1)
    heads, _ = problem.fitted(form, kept, 4)
    cached = heads.encode(problem.x.unsqueeze(0), problem.rotation)
    assert [t.dtype for t in cached if t.shape[-1]] == [torch.uint8]
    keys = heads.rebuild(cached, problem.rotation)
    for queries in (1, 2, 5):
        q = draw(1, H, queries, d)
        found = heads.scores(q, cached, problem.rotation)
        assert relative(found, q @ keys.mT) < EXACT


@pytest.mark.parametrize("kept", [8, 16, 40])
@pytest.mark.parametrize(
    "form, turning", [("channels", 20), ("channels", 8), ("commuting", 20), ("per-head", 8)]
)
def test_what_is_dropped_is_lost_as_the_plan_counts_it(form, turning, kept):
    """In a metric that RoPE leaves alone: by the worth of the dropped, and none of the kept."""
    problem = Problem(turning, alike=True)
    heads, fit = problem.fitted(form, kept)
    usual = problem.x[1:].unsqueeze(0)
    keys = torch.einsum("td,hde->hte", usual[0], problem.W) + problem.b.unsqueeze(1)
    off = as_keys(heads.rebuild(unrounded(heads, usual)), fit)[0] - keys
    assert off.mean(1).abs().max() < EXACT * keys.abs().max()  # a dropped one keeps its mean
    lost = (off @ problem.metric.M.root).square().sum() / len(off[0])
    A = problem.W @ problem.metric.M.root
    total = (A * (problem.metric.sigma @ A)).sum()
    noise = DISTORTION[8] * (total - lost)
    assert fit.error**2 == pytest.approx(((lost + noise) / total).item(), rel=1e-6)
    curve = FORMS[form].coded_curve(problem.W, problem.metric, (8,), problem.geometry)
    planned = {shape.width: loss for shape, loss in curve}
    assert planned[kept] == pytest.approx((lost + noise).item(), rel=1e-6)


@pytest.mark.parametrize("form, turning", [case for case in CASES if case[0] != "ranks"])
def test_more_bits_lose_less_and_all_that_is_planned_can_be_fitted(form, turning):
    problem = Problem(turning)
    curve = FORMS[form].coded_curve(problem.W, problem.metric, WIDTHS, problem.geometry)
    by_size = sorted((FORMS[form].bytes(s, problem.geometry, 2), loss) for s, loss in curve)
    assert len(curve) > 8 and all(a[1] >= b[1] for a, b in itertools.pairwise(by_size))
    for shape, _ in curve[:: max(1, len(curve) // 5)]:
        fit = FORMS[form].fit(
            problem.W, problem.b, problem.metric, shape, problem.geometry, "joint"
        )
        assert 0 < fit.error < 1
        for name, tensor in fit.tensors.items():
            assert torch.isfinite(tensor).all(), name


@pytest.mark.parametrize("form", ["channels", "commuting", "per-head"])
def test_dead_heads_are_coded(form):
    problem = Problem(20)
    problem.W[1] = 0
    heads, fit = problem.fitted(form, 16, 4)
    assert 0 < fit.error < 1
    read = heads.rebuild(heads.encode(problem.x.unsqueeze(0), problem.rotation), problem.rotation)
    dead = rotate(problem.b[1].expand(1, 1, len(problem.x), d), problem.rotation)
    assert (as_keys(read, fit)[:, 1:2] - dead).abs().max() < 1e-6


def test_no_other_angle_is_worth_less():
    draw = drawn()
    S, M = (m @ m.mT for m in (draw(50, 2, 2), draw(50, 2, 2)))
    parts = lambda t: (t[:, 0, 0], t[:, 0, 1], t[:, 1, 1])

    def worth(angle):
        turn = torch.stack((angle.cos(), angle.sin(), -angle.sin(), angle.cos()), -1).view(-1, 2, 2)
        diagonals = [(turn @ t @ turn.mT).diagonal(dim1=-2, dim2=-1) for t in (S, M)]
        return (diagonals[0] * diagonals[1]).prod(-1)

    chosen = worth(quietest_angle(parts(S), parts(M)))
    for angle in torch.linspace(0, 2 * torch.pi, 200, dtype=torch.float64):
        assert (chosen <= worth(angle.expand(50)) * 1.01).all()
    assert (chosen < worth(torch.zeros(50).double()) / 2).double().mean() > 0.3


# ------------------------------------------------------------------------------- models and caches


def sides(form: str) -> dict:
    """Keys of 60 channels in this form, unlike in each layer, and values as ever."""
    codes = [[[8, 8], [4, 16]], [[6, 8], [3, 8], [2, 40]], [[8, 24]]]
    bits, draw = [], torch.Generator().manual_seed(5)
    for blocks in codes:
        # pairs that turn together have the same
        times = 2 if form == "turning" else 1
        digits = "".join(str(b) * (n // times) for b, n in blocks).ljust(60 // times, "0")
        mixed = "".join(digits[i] for i in torch.randperm(60 // times, generator=draw))
        step = 20 // times
        bits.append([mixed[h * step : h * step + step] * times for h in range(3)])
    return {
        "keys": {
            "base_width": [24, 56, 24],
            "rank": [0, 0, 0],
            "alignment": True,
            "form": form,
            "codes": [[blocks, None] for blocks in codes],
            "bits": bits,
        },
        "values": {
            "base_width": [16, 20, 8],
            "rank": [4, 0, 4],
            "alignment": True,
            "codes": [[[[8, 16]], [[4, 4]]], [[[6, 20]], None], [[[8, 8]], [[2, 4]]]],
        },
    }


# bytes of a token: keys, then values
ROWS = (2 + 8 + 8) + (2 + 6 + 3 + 10) + (2 + 24) + (18 + 3 * 4) + 17 + (10 + 3 * 3)


def model_of(form: str, family: str = "llama", **config):
    """Of three layers, float64, with centres among latents, so that either is the nearer one of
    some tokens.
    """
    model, draw = uneven(family, sides(form)).double(), drawn(3)
    for module in model.modules():
        if isinstance(module, Codes):
            for constant in (module.centres, module.lift):
                constant.data.copy_(draw(*constant.shape))
        elif isinstance(module, LowRankHeads) and module.bias is not None:
            module.bias.data.copy_(draw(*module.bias.shape))
    for name, value in config.items():
        setattr(model.config, name, value)
    return model


@pytest.fixture
def exact(monkeypatch):
    """Softmax in float64, too: rounded to float32, latents at a border would take either code."""
    monkeypatch.setattr(torch, "float32", torch.float64)


# partial RoPE (gptj, gpt_neox), layers without (smollm3), windows (qwen2), one query a head (mha)
FAMILIES = [
    *(("channels", f) for f in ("llama", "qwen2", "llama-bias", "gptj", "gpt_neox", "smollm3")),
    *(
        ("axes", f)
        for f in ("llama", "gpt2", "smollm3", "qwen3", "gptj", "cohere-norm", "gemma3_text")
    ),
    *(("turning", f) for f in ("llama", "qwen2", "llama-mha-yarn")),
]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("form, family", FAMILIES)
def test_cached_equals_uncached(form, family, kind, exact):
    model, ids = model_of(form, family), prompt(40, batch=2)
    cache = (
        DynamicCache(config=model.config)
        if kind == "dynamic"
        else StaticCache(config=model.config, max_cache_len=48)
    )
    assert relative(steps(model, ids, cache), whole(model, ids)) < EXACT
    if family == "llama":
        assert cache_bytes(cache) == 2 * ROWS * (40 if kind == "dynamic" else 48)
        assert formula_bytes(model.config, 8) == ROWS


@pytest.mark.parametrize("form, family", FAMILIES)
def test_all_paths_read_the_same(form, family, exact):
    """Where the kernel is asked for, too, which reads none of them: the split path does."""
    logits = [
        steps(
            model := model_of(form, family, lrkv_path=path),
            prompt(40),
            DynamicCache(config=model.config),
            first=20,
        )
        for path in ("rebuild", "split", "kernel")
    ]
    assert relative(*logits[:2]) < EXACT and torch.equal(*logits[1:])


@pytest.mark.parametrize("form", ["channels", "axes", "turning"])
def test_generation_with_padding_on_the_left(form, exact):
    model, ids = model_of(form), prompt(12)
    expected = model.generate(ids, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    batch = torch.cat((torch.cat((torch.full((1, 4), 258), ids), 1), prompt(16, seed=2)))
    mask = torch.ones_like(batch)
    mask[0, :4] = 0
    found = model.generate(batch, attention_mask=mask, **GREEDY)
    assert torch.equal(found[:1, 16:], expected[:, 12:])


@pytest.mark.parametrize("form", ["channels", "axes", "turning"])
def test_gradients_reach_every_factor(form):
    model = model_of(form).train()
    model(prompt(30), labels=prompt(30)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # a centre takes no gradient, and not every slot of so few tokens has met a sink
        if "centres" not in name and "values" not in name:
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    "change, says",
    [
        ({"codes": None}, "does not go with"),
        ({"rank": [4] * 3}, "does not go with"),
        ({"bits": [["8" * 20] * 3] * 3}, "are not those of codes"),
        ({"bits": [["8" * 20] * 2] * 3}, "bits of 40 channels"),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["channels", "axes", "turning"])
def test_a_config_that_cannot_be(form, change, says):
    spec = sides(form)
    spec["keys"] = {k: v for k, v in (spec["keys"] | change).items() if v is not None}
    with pytest.raises(ValueError, match=says):
        uneven(lrkv=spec)


# ------------------------------------------------------------------------------------- conversions


@pytest.mark.parametrize(
    "keys, family",
    [
        ("channels", "llama"),
        ("channels", "gpt_neox"),
        ("channels", "smollm3"),
        ("commuting", "llama-bias"),
        ("per-head", "llama-bias"),
        ("per-head", "qwen3"),
    ],
)
def test_a_conversion_is_cached_as_planned_saved_and_loaded(
    keys, family, tiny, tmp_path, monkeypatch
):
    plan = convert(
        str(tiny(family)),
        tmp_path / "out",
        keys=keys,
        cache_ratio=0.3,
        calibration_tokens=1024,
    ).plan
    assert plan.keys == keys and plan.ratio <= 0.3
    folder = read_folder(tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        for layer in folder.record.attention["self"].layers:
            for name, shape in folder.tensors("self", layer.layer).items():
                assert tuple(file.get_slice(f"{layer.path}.{name}").get_shape()) == shape
    rotated = ("base",) if keys == "commuting" else ()
    assert folder.attention["self"].keys.rotated_in_cache == rotated
    model, ids = load(tmp_path / "out", dtype=torch.float64), prompt(40)
    monkeypatch.setattr(torch, "float32", torch.float64)  # as `exact`
    cache = DynamicCache(config=model.config)
    expected = whole(model, ids)
    assert relative(steps(model, ids, cache), expected) < EXACT
    coded = sum(
        t.numel()
        for layer in cache.layers
        for t in (layer.keys, layer.values)
        if t is not None and t.dtype == torch.uint8
    )
    assert coded == cache_bytes(cache) == 40 * plan.bytes_after
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(whole(load(tmp_path / "again", dtype=torch.float64), ids), expected)


@pytest.mark.parametrize(
    "keys, whole_rank",
    [("channels", {}), ("commuting", {"base_width_k": 60}), ("per-head", {"base_width_v": 20})],
)
@pytest.mark.parametrize("family", ["llama-bias", "llama-mha-yarn"])
def test_all_at_eight_bits_is_nearly_the_original(keys, whole_rank, family, tiny, tmp_path):
    """And the queries have absorbed what channels were turned by."""
    if keys == "per-head":
        whole_rank = {"base_width_v": 20, "rank_k": 20}
    convert(
        str(tiny(family)),
        tmp_path / "out",
        keys=keys,
        rank_v=20,
        bits="8",
        force=True,
        refit=False,
        calibration_tokens=1024,
        **({"rank_k": 0} | whole_rank),
    )
    ids = prompt(40)
    ours, theirs = (whole(load(folder), ids) for folder in (tmp_path / "out", tiny(family)))
    assert ((ours - theirs).norm() / theirs.norm()).item() < 0.05


@pytest.mark.parametrize(
    "options, says",
    [
        (["--keys", "channels", "--bits", "16", "--cache-ratio", "0.5"], "goes with codes only"),
        (["--keys", "channels"], "goes with codes only"),
        (["--keys", "channels", "--calibration", "none"], "goes with codes only"),
        (["--keys", "channels", "--rank-k", "3", "--bits", "8"], "has no residuals"),
        (["--keys", "channels", "--cache-ratio", "0.3", "--max-width-k", "20"], "codes only"),
        (["--keys", "channels", "--base", "aligned", "--bits", "8"], "codes go with the joint"),
        (["--keys", "channels", "--base-width-k", "62", "--bits", "8"], "out of range"),
        (["--keys", "channels", "--cache-ratio", "0.01"], "below the smallest plan"),
    ],
    ids=str,
)
def test_channels_that_cannot_be(options, says, source, tmp_path):
    refused(source, tmp_path / "out", *options, says=says)


@pytest.mark.parametrize(
    "family, says",
    [("gpt2", "needs RoPE"), ("qwen3", "keys without a norm"), ("olmo2", "goes with codes only")],
)
def test_families_whose_keys_make_no_channels(family, says, tiny, tmp_path):
    options = ["--keys", "channels", "--cache-ratio", "0.3"]
    refused(tiny(family), tmp_path / "out", *options, says=says)
