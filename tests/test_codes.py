"""Latents as codes: rows of bytes hold what they say, every cache of transformers holds the rows,
and a budget spends bits and ranks together.
"""

import itertools
import json
from dataclasses import replace

import encoder_decoders
import pytest
import torch
from conftest import CONFIGS, build, prompt, refused, relative, run, uneven
from encoder_decoders import stepwise
from safetensors.torch import load_file, save_file
from test_caches import GREEDY, QUANTISED, Away, load, steps, whole
from test_convert import fresh
from transformers import (
    AutoTokenizer,
    DynamicCache,
    EncoderDecoderCache,
    QuantizedCache,
    StaticCache,
)

from lrkv_convert import LrkvError, convert, read_folder
from lrkv_convert.evaluate.memory import (
    bytes_by_kind,
    cache_bytes,
    formula_bytes,
    formula_bytes_by_kind,
)
from lrkv_convert.examples.text import BUILT_IN, read_texts, windows
from lrkv_convert.families import FAMILIES, Geometry, Site
from lrkv_convert.fit.codes import DISTORTION, Spread
from lrkv_convert.fit.metric import Metric, square_root
from lrkv_convert.forms import FORMS, Shape
from lrkv_convert.modeling import CLASSES
from lrkv_convert.modeling.codes_lrkv import MULTIPLES, PLANES, REACH, Codes, row_bytes
from lrkv_convert.modeling.factors_lrkv import LowRankHeads
from lrkv_convert.plan.allocate import allocate
from lrkv_convert.plan.curves import coded_curve

FLOAT64 = 1e-9  # codes are the same, what is made of them is a sum in another order
FLOAT32 = 1e-3  # a latent at the border of two codes may take either


@pytest.fixture
def exact(monkeypatch):
    """Softmax in float64, too: rounded to float32, latents at a border would take either code."""
    monkeypatch.setattr(torch, "float32", torch.float64)


def drawn(seed: int = 0):
    """draw(*shape): normal numbers of their own."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def coder(*blocks: tuple[int, int], heads: int = 1, seed: int = 0) -> Codes:
    """Codes of these blocks, of usual tokens about a centre near zero and of sinks far off."""
    width, draw = sum(count for _, count in blocks), drawn(seed)
    made = Codes(blocks, width, heads, 3, 20)
    with torch.no_grad():
        made.centres.copy_(torch.stack((draw(heads, width) / 9, 40 + draw(heads, width))))
        made.lift.copy_(draw(3, 20))
    return made


# ------------------------------------------------------------------------------------ rows of bytes

WIDTHS = list(PLANES)
MIXES = [
    tuple((bits, MULTIPLES[bits] * count) for bits, count in zip(widths, (3, 1, 2, 1, 5)))
    for n in range(1, len(WIDTHS) + 1)
    for widths in itertools.combinations(WIDTHS, n)
]


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("blocks", MIXES, ids=str)
def test_rows_hold_the_codes_of_every_mix_of_widths(blocks, heads):
    made = coder(*blocks, heads=heads)
    u = drawn(1)(2, heads, 50, made.width) * 3
    u[:, :, ::7] += made.centres[1].unsqueeze(1)
    rows, (codes, scale) = made.pack(u), made.codes(u)
    assert rows.dtype == torch.uint8 and rows.shape == (2, heads, 50, made.bytes)
    assert made.bytes == 2 + sum(bits * count for bits, count in blocks) / 8 == row_bytes(blocks)
    found, found_scale = made.unpacked(rows)
    assert torch.equal(found.float(), codes) and torch.equal(found_scale, scale)
    most = torch.tensor([2.0**bits - 1 for bits, count in blocks for _ in range(count)])
    assert (codes >= 0).all() and (codes <= most).all()
    assert (codes.amax((0, 1, 2)) == most).any() and (codes == 0).any()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        through = made.through(u).to(dtype)
        assert torch.equal(made.read(rows, dtype), through)  # bit for bit
        assert torch.equal(made.read(through, dtype), through)
    # tokens by themselves and all at once
    assert torch.equal(made.pack(u[:, :, 7:8]), rows[:, :, 7:8])


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_error_of_a_width_is_what_plans_count_with(bits):
    """Of 64 normal numbers the largest is nearer than in latents of models, which D was measured
    on: many bits are better than that, none much worse.
    """
    made, z = coder((bits, 64)), drawn(1)(1, 1, 4000, 64)
    with torch.no_grad():
        made.centres[0] = 0
    read = made.through(z / REACH[bits])[..., :-1] * REACH[bits]
    assert DISTORTION[bits] / 4 < (read - z).square().mean() < 1.25 * DISTORTION[bits]


def test_what_lies_within_reach_is_read_to_half_a_step():
    blocks = ((8, 4), (6, 4), (4, 4), (3, 8), (2, 4))
    made, half = coder(*blocks), coder(*blocks).levels(torch.device("cpu"))[0]
    u = drawn(1)(1, 1, 500, 24)
    about, scale = u - made.centres[0], made.codes(u)[1].abs()
    within = about.abs() < scale * (1 - 1e-3)  # of a scale rounded to float16
    off = (made.through(u)[..., :-1] - about).abs()
    assert 0.9 < within.float().mean() < 1 and (off <= scale / half / 2 * 1.001)[within].all()
    # what lies beyond is read as the outermost code
    assert (off <= about.abs())[~within].all()


def test_a_sink_is_marked_and_costs_the_others_nothing():
    made, draw = coder((8, 8), (4, 16), (2, 8)), drawn(1)
    usual, sink = draw(1, 1, 9, 32), draw(1, 1, 1, 32) + made.centres[1]
    u = torch.cat((usual[:, :, :4], sink, usual[:, :, 4:]), dim=2)
    rows = made.pack(u)
    read, scale = made.read(rows, torch.float32), made.unpacked(rows)[1].flatten()
    assert read[0, 0, :, -1].tolist() == [0] * 4 + [1] + [0] * 5
    others = [i for i in range(10) if i != 4]
    assert torch.equal(rows[:, :, others], made.pack(usual))
    # as small a scale as theirs, though it lies 40 times as far off
    assert scale[4] < 0 and -scale[4] < 1.5 * scale[others].max()
    off = (read[0, 0, 4, :-1] - (sink - made.centres[1]).flatten()).abs()
    assert off.max() < 0.6 * -scale[4] and off[:8].max() < -scale[4] / 128


def test_rows_of_zeros_are_zeros():
    """A static cache that is not filled."""
    made = coder((6, 8), (3, 8), heads=3)
    rows = torch.zeros(2, 3, 5, made.bytes, dtype=torch.uint8)
    assert torch.equal(made.read(rows, torch.float32), torch.zeros(2, 3, 5, 17))


def test_latents_of_any_size_are_finite():
    """Of nothing at all, too small and too large for a scale in float16."""
    made = coder((8, 4), (4, 4))
    with torch.no_grad():
        made.centres.zero_()
    for size in (0.0, 1e-30, 1e30):
        u = torch.full((1, 1, 1, 8), size)
        read = made.read(made.pack(u), torch.float32)[..., :-1]
        assert read.isfinite().all() and (read - u).abs().max() <= max(2.0**-14, size)


@pytest.mark.parametrize(
    "blocks, width, says",
    [
        ([(5, 8)], 8, "8, 6, 4, 3, 2 bits, not 5"),
        ([(16, 8)], 8, "not 16"),
        ([(2, 8), (8, 8)], 16, "most bits first"),
        ([(4, 8), (4, 8)], 16, "once for each width"),
        ([(8, 8)], 9, "do not make 9 latents"),
        ([(8, 12), (4, -4)], 8, "do not make 8 latents"),
        ([(6, 6)], 6, "6 bits come in multiples of 4, not 6"),
        ([(4, 3)], 3, "4 bits come in multiples of 2, not 3"),
        ([(3, 12)], 12, "3 bits come in multiples of 8, not 12"),
        ([(2, 6)], 6, "2 bits come in multiples of 4, not 6"),
    ],
)
def test_blocks_that_do_not_fit(blocks, width, says):
    with pytest.raises(ValueError, match=says):
        Codes(blocks, width, 1, 3, 20)


@pytest.mark.parametrize(
    "side, says",
    [
        ({"codes": [[[[8, 18]], None]] * 3}, "do not make 20 latents"),
        ({"codes": [[[[8, 20]], None]] * 3, "alignment": False}, "need alignment maps"),
        ({"codes": [[[[8, 20]], None]] * 3, "alignment": False, "form": "rotary"}, "no codes"),
        ({"codes": [[[[8, 20]], None]] * 3, "form": "nothing"}, "nothing"),
    ],
)
def test_a_config_with_codes_that_cannot_be(side, says):
    plain = {"base_width": [20] * 3, "rank": [0] * 3, "alignment": True}
    with pytest.raises((ValueError, KeyError), match=says):
        uneven(lrkv={"keys": {**plain, **side}, "values": plain})


# ------------------------------------------------------------------------------- models and caches

# layers without base or without residual, of keys or of values, in every width
CODED = {
    "keys": {
        "base_width": [0, 32, 32],
        "rank": [8, 0, 4],
        "alignment": True,
        "codes": [
            [None, [[8, 4], [2, 4]]],
            [[[8, 8], [4, 16], [3, 8]], None],
            [[[6, 8], [2, 24]], [[4, 4]]],
        ],
    },
    "values": {
        "base_width": [16, 32, 16],
        "rank": [0, 0, 4],
        "alignment": True,
        "codes": [
            [[[6, 8], [4, 8]], None],
            [[[8, 8], [2, 24]], None],
            [[[3, 16]], [[8, 4]]],
        ],
    },
}
# bytes of a token: keys and values, layer by layer, of bases and of three heads' residuals
ROWS = (3 * 7 + 12) + (21 + 16) + (14 + 3 * 4 + 8 + 3 * 6)


def spread_out(model):
    """Centres among the latents, so that either is the nearer one of some tokens, a lift and
    biases.
    """
    draw = drawn(3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Codes):
                module.centres.copy_(draw(*module.centres.shape))
                module.lift.copy_(draw(*module.lift.shape))
            elif isinstance(module, LowRankHeads):
                module.bias.copy_(draw(*module.bias.shape))
    return model


def coded(family: str = "llama", dtype=torch.float64, **config):
    model = spread_out(uneven(family, CODED)).to(dtype)
    for name, value in config.items():
        setattr(model.config, name, value)
    return model


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("path", ["auto", "rebuild", "split"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gpt2"])
def test_cached_equals_uncached(name, path, kind, exact):
    model, ids = coded(name, lrkv_path=path), prompt(40, batch=2)
    cache = (
        DynamicCache(config=model.config)
        if kind == "dynamic"
        else StaticCache(config=model.config, max_cache_len=48)
    )
    assert relative(steps(model, ids, cache), whole(model, ids)) < FLOAT64
    if name in ("llama", "gpt2"):
        assert cache_bytes(cache) == ROWS * 2 * (40 if kind == "dynamic" else 48)
    else:  # in windows of 24 tokens, but for the first layer of qwen2
        windows = ROWS * 24 if name == "mistral" else (ROWS - 33) * 24 + 33 * 40
        assert kind == "static" or cache_bytes(cache) <= 2 * windows


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_offloaded_rows_are_back_when_they_are_read(name, exact):
    model, ids = coded(name), prompt(40, batch=2)
    assert relative(steps(model, ids, Away(model)), whole(model, ids)) < FLOAT64


def test_every_mark_is_read():
    """Tokens about either centre are in what these tests read."""
    model, marks = coded(), []
    for module in model.modules():
        if isinstance(module, Codes):
            read, marked = module.values, marks

            def values(codes, scale, read=read):
                marked.append((scale < 0).double().mean().item())
                return read(codes, scale)

            module.values = values
    whole(model, prompt(40))
    assert len(marks) == 8 and sum(0 < share < 1 for share in marks) >= 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cached_equals_uncached_in_other_dtypes(dtype):
    model, ids = coded(dtype=dtype), prompt(40, batch=2)
    expected, cache = whole(model, ids), DynamicCache(config=model.config)
    distance = ((steps(model, ids, cache) - expected).norm() / expected.norm()).item()
    assert distance < (FLOAT32 if dtype == torch.float32 else 0.1)
    assert cache_bytes(cache) == ROWS * 2 * 40 == 2 * 40 * formula_bytes(model.config, 2)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_both_paths_read_the_same(name, exact):
    """All tokens at once, and one query against what is cached."""
    logits = []
    for path in ("rebuild", "split"):
        model = coded(name, lrkv_path=path)
        logits.append(steps(model, prompt(40), DynamicCache(config=model.config), first=20))
    assert relative(*logits) < FLOAT64


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation_in_all_ways(name, exact):
    """Greedy with either cache and without one, drafts that crop the cache, beams that reorder it,
    left padding.
    """
    model, ids = coded(name), prompt(12)
    expected = model.generate(ids, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    static = dict(cache_implementation="static", disable_compile=True)
    assert torch.equal(model.generate(ids, **static, **GREEDY), expected)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY), expected)
    beams = [model.generate(ids, num_beams=3, use_cache=u, **GREEDY) for u in (True, False)]
    assert torch.equal(*beams)
    padded = torch.cat((torch.full((1, 4), 258), ids), 1)
    batch = torch.cat((padded, prompt(16, seed=2)))
    mask = torch.ones_like(batch)
    mask[0, :4] = 0
    found = model.generate(batch, attention_mask=mask, **GREEDY)
    assert torch.equal(found[:1, 16:], expected[:, 12:])


@torch.no_grad()
def test_left_padding_changes_no_logits(exact):
    model, ids = coded(), prompt(12)
    padded = torch.cat((torch.full((1, 5), 258), ids), 1)
    given = dict(
        attention_mask=(padded != 258).long(), position_ids=(torch.arange(17) - 5).clamp(0)
    )
    given["position_ids"] = given["position_ids"][None]
    for use_cache in (True, False):
        found = model(padded, use_cache=use_cache, **given).logits[:, 5:]
        assert relative(found, model(ids, use_cache=False).logits) < FLOAT64


@torch.no_grad()
def test_rows_of_a_batch_are_copied_chosen_and_cut(exact):
    model, ids = coded(), prompt(20, batch=2)
    cache = DynamicCache(config=model.config)
    model(ids[:, :15], past_key_values=cache)
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([4, 1]))
    cache.crop(-3)
    assert cache_bytes(cache) == ROWS * 2 * 12
    order = torch.tensor([1, 0])
    found = model(ids[order, 12:], past_key_values=cache).logits
    assert relative(found, whole(model, ids[order], 12)) < FLOAT64


@pytest.mark.parametrize("path", ["auto", "rebuild", "split"])
@pytest.mark.parametrize("kinds", [("lrkv",), ("lrkv_cross",), ("lrkv", "lrkv_cross")], ids=str)
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_both_caches_of_an_encoder_decoder(name, kinds, path, exact):
    spec = {
        side: {key: value if key == "alignment" else value[1:] for key, value in of.items()}
        for side, of in CODED.items()
    }
    config = encoder_decoders.CONFIGS[name]().to_dict()
    config_class, _, model_class = CLASSES[config.pop("model_type")]
    torch.manual_seed(0)
    model = model_class(config_class(**config, **dict.fromkeys(kinds, spec), lrkv_path=path))
    model = spread_out(model).eval().double()
    ids = encoder_decoders.target(2)
    expected = encoder_decoders.logits(model, ids)
    found, cache = stepwise(model, ids, 3)
    assert relative(found, expected) < FLOAT64
    assert isinstance(cache, EncoderDecoderCache)
    formula, live = formula_bytes_by_kind(model.config, 8), bytes_by_kind(cache)
    for kind, field, length in (("self", "lrkv", ids.shape[1]), ("cross", "lrkv_cross", 11)):
        assert field not in kinds or formula[kind] == ROWS - 33
        assert live[kind] == 2 * length * formula[kind]
    given = encoder_decoders.source(model, 2)
    greedy = dict(max_new_tokens=8, do_sample=False, num_beams=2)
    assert torch.equal(
        model.generate(**given, **greedy), model.generate(**given, **greedy, use_cache=False)
    )


class Rounding(DynamicCache):
    """As transformers' quantised caches are made."""

    def __init__(self, config):
        super().__init__(config=config)
        for layer in self.layers:
            layer._quantize = lambda tensor, axis: tensor


@pytest.mark.parametrize("backend", [*QUANTISED, "another"])
def test_quantised_caches_are_refused(backend):
    model = coded(dtype=torch.float32)
    try:
        cache = (
            Rounding(model.config)
            if backend == "another"
            else QuantizedCache(config=model.config, **QUANTISED[backend])
        )
    except (ImportError, ValueError) as error:
        pytest.skip(f"no such cache here: {error}")
    with pytest.raises(ValueError, match=r"caches codes.*round them again.*ordinary cache"):
        model(prompt(10), past_key_values=cache)


# ---------------------------------------------------------------------------------------- training


def test_gradients_pass_as_if_nothing_had_been_rounded():
    made, draw = coder((8, 8), (2, 8), heads=3), drawn(1)
    u, towards = draw(1, 3, 6, 16).requires_grad_(), draw(1, 3, 6, 17)
    with torch.no_grad():
        u[:, :, 2] += made.centres[1]
    (made.through(u) * towards).sum().backward()
    assert torch.equal(u.grad, towards[..., :-1])
    usual = torch.tensor([i != 2 for i in range(6)])
    for centre, tokens in zip(made.centres.grad, (usual, ~usual)):
        assert torch.allclose(centre, -towards[0, :, tokens, :-1].sum(1))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_training_is_the_same_with_and_without_a_cache(name):
    ids, found = prompt(20, batch=2), {}
    for training, use_cache in itertools.product((True, False), repeat=2):
        model = coded(name).train(training)
        # nothing is random
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        loss = model(ids, labels=ids, use_cache=use_cache).loss
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        assert all(g is not None and g.isfinite().all() for g in gradients.values())
        parts = ("W_shared.weight", "C", "U.weight", "B", "bias", "centres", "lift")
        for part in parts:
            assert any(g.abs().max() > 0 for n, g in gradients.items() if n.endswith(f".{part}"))
        found[training, use_cache] = loss.item(), gradients
    first = found.pop((True, False))
    for loss, gradients in found.values():
        assert loss == pytest.approx(first[0], rel=FLOAT64)
        for key, gradient in gradients.items():
            # keys' biases, of which attention without RoPE sees nothing
            size = max(first[1][key].abs().max().item(), 1e-6)
            assert (gradient - first[1][key]).abs().max() < 1e-7 * size, key


def test_a_model_learns_through_its_codes():
    model, ids = coded(dtype=torch.float32).train(), prompt(20, batch=2)
    learned = [p for n, p in model.named_parameters() if ".keys." in n or ".values." in n]
    optimiser, losses = torch.optim.Adam(learned, lr=3e-3), []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


# -------------------------------------------------------------------------------- planning, fitting


def problem(H: int = 4, D: int = 96, d: int = 24, seed: int = 0, dead: int = 0):
    """Weights (H, D, d) and a metric for codes, float64; the first `dead` heads are zero."""
    draw = lambda *shape: drawn(seed + len(shape))(*shape).double()
    W = draw(H, D, d) / D**0.5
    W[:dead] = 0
    x = drawn(seed + 7)(4 * D, D).double() * torch.logspace(0.5, -1.5, D, dtype=torch.float64)
    q = drawn(seed + 8)(H, 9 * d, d).double() * torch.linspace(1, 0.1, d, dtype=torch.float64)
    covariance, shares = x.T @ x / len(x), torch.linspace(0.2, 1, H, dtype=torch.float64)
    spread = Spread(draw(D), 4 * draw(D).flip(0), covariance, shares)
    return W, Metric(covariance, square_root(q.mT @ q), None, spread, shares)


def side(geometry: Geometry, bits, seed: int, dead: int = 0):
    W, metric = problem(geometry.kv_heads, geometry.width, geometry.head_dim, seed, dead)
    return coded_curve(W, metric, geometry, 1.0, "joint", bits)


# 4 x 24 channels, and 3 x 15, which are no multiple of 8, of a model wider and narrower than that
SIZES = [(4, 96, 24), (3, 60, 15), (3, 30, 15)]
LLAMA = FAMILIES["llama"].any


@pytest.mark.parametrize("bits", [(8, 6, 4, 3, 2), (8, 4, 2), (4,)], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_more_bytes_never_predict_more_loss(sizes, bits):
    """And no plan goes beyond its budget."""
    H, D, d = sizes
    geometry = Geometry(width=D, kv_heads=H, groups=2, head_dim=d, rotary_dim=d - d % 2)
    sites = [Site(i, "self", LLAMA.module(i).rstrip("."), LLAMA, geometry) for i in range(6)]
    curves = [(side(geometry, bits, 2 * i), side(geometry, bits, 2 * i + 1)) for i in range(6)]
    losses = []
    for ratio in (0.08, 0.12, 0.16, 0.2, 0.25, 0.3):
        plan = allocate(curves, sites, 6, 2, ratio)
        most = sum(max(p.size for p in curve) for pair in curves for curve in pair)
        spendable = min(ratio * plan.bytes_before, most)
        assert plan.ratio <= ratio
        # within 2 %, or, of so few bytes, a step of one side
        assert plan.bytes_after > spendable - max(0.02 * spendable, 8)
        known = [{p.codes: p.loss for p in curve} for pair in curves for curve in pair]
        chosen = [s.codes[0] for site in plan.sites for s in (site.keys, site.values)]
        losses.append(sum(loss[codes] for loss, codes in zip(known, chosen)))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] / 2


@pytest.mark.parametrize("dead", [1, 2, 3])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_what_is_planned_can_be_fitted(sizes, dead):
    """Heads that are nothing, all of them included, and channels that are no multiple of 8: every
    point of a curve gives the tensors of its module, all finite.
    """
    H, D, d = sizes
    geometry = Geometry(width=D, kv_heads=H, groups=2, head_dim=d, rotary_dim=d - d % 2)
    W, metric = problem(H, D, d, dead=H if dead == 3 else dead)
    curve = FORMS["joint"].coded_curve(W, metric, (8, 6, 4, 3, 2), geometry)
    assert curve
    for shape, loss in (curve[0], curve[len(curve) // 2], curve[-1]):
        fitted = FORMS["joint"].fit(W, None, metric, shape, geometry, "joint")
        module = LowRankHeads(D, H, d, shape.width, 0, True, False, shape.codes)
        assert {n: t.shape for n, t in module.state_dict().items()} == {
            n: t.shape for n, t in fitted.tensors.items()
        }
        assert all(t.isfinite().all() for t in fitted.tensors.values()) and loss >= 0
        module.load_state_dict(fitted.tensors)
        keys = module.rebuild(module.encode(drawn(9)(1, 5, D)))
        assert keys.shape == (1, H, 5, d) and keys.isfinite().all()


@pytest.mark.parametrize("r", [0, 3])
def test_the_fit_reads_back_what_it_was_made_of(r):
    """With 8 bits of all latents keys and values are the original's, of usual tokens and of the
    first one alike, whatever their size.
    """
    H, D, d = 4, 96, 24
    W, metric = problem(H, D, d)
    b = drawn(5)(H, d).double()
    m = 96 if not r else 80
    shape = Shape(m, 4 * (r > 0), "joint", (((8, m),), ((8, 4),) if r else None))
    geometry = Geometry(width=D, kv_heads=H, groups=2, head_dim=d, rotary_dim=0)
    fitted = FORMS["joint"].fit(W, b, metric, shape, geometry, "joint")
    module = LowRankHeads(D, H, d, m, shape.rank, True, False, shape.codes)
    module.load_state_dict(fitted.tensors)
    spread = metric.spread
    root = square_root(spread.covariance).root
    usual = spread.mean + drawn(6)(1, 200, D).double() @ root
    first = spread.first + drawn(8)(1, 20, D).double() @ root / 3
    x = torch.cat((usual, first), 1)
    original = torch.einsum("ntD,hDd->nhtd", x, W) + b.unsqueeze(1)
    found = module.rebuild(module.encode(x.float()))
    means = torch.einsum("D,hDd->hd", spread.mean, W) + b
    size = (original[:, :, :200] - means.unsqueeze(1)).norm() / 200**0.5
    off = (found - original).square().sum((0, 1, 3)).sqrt() / size
    assert off.mean() < (0.02 if not r else 0.3) and off[200:].max() < 3 * off[:200].max()
    marks = [
        m.read(z, torch.float32)[..., -1]
        for m, z in zip(module.coders, module.encode(x.float()))
        if m
    ]
    for mark in marks:
        assert (mark[..., :200] == 0).all() and (mark[..., 200:] == 1).all()


# ------------------------------------------------------------------------------------- conversions

QUARTER = dict(rank=None, cache_ratio=0.25, bits="auto", dtype="bfloat16")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_conversion_caches_the_bytes_of_its_plan(name, tiny, tmp_path):
    options = dict(cache_ratio=0.25, dtype="bfloat16", calibration_tokens=1024)
    done = convert(str(tiny(name)), tmp_path / "out", **options)
    assert 0.2 < done.plan.ratio <= 0.25
    model, ids = load(tmp_path / "out"), prompt(20, batch=3)
    assert model.dtype == torch.bfloat16
    cache = model(ids).past_key_values
    assert cache_bytes(cache) == 60 * formula_bytes(model.config, 2) == 60 * done.plan.bytes_after
    assert done.record.attention["self"].cache.kv_bytes_per_token == done.plan.bytes_after
    layers = read_folder(tmp_path / "out").record.attention["self"].layers
    said = [
        [list(map(list, blocks)) for blocks in (s.keys.codes[0], s.values.codes[0])]
        for s in done.plan.sites
    ]
    assert [[layer.keys.codes[0], layer.values.codes[0]] for layer in layers] == said
    assert all(
        2 <= s.bits <= 8 and 0 < s.error < 1 for each in layers for s in (each.keys, each.values)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_converted_model_is_cached_saved_and_loaded(dtype, converted, tmp_path):
    ratio = 0.25 if dtype == "bfloat16" else 0.125
    folder = converted(**{**QUARTER, "cache_ratio": ratio, "dtype": dtype})
    model, ids = load(folder), prompt(40)
    expected = whole(model, ids)
    found = steps(model, ids, DynamicCache(config=model.config))
    assert (found - expected).norm() < (0.05 if dtype == "bfloat16" else 0.01) * expected.norm()
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "codes_lrkv.py").is_file()
    again = load(tmp_path / "again")
    assert again.config.lrkv == model.config.lrkv
    assert torch.equal(whole(again, ids), expected)
    done = fresh(tmp_path / "again", tmp_path, blocked=True, imported=False, trust_remote_code=True)
    assert done.returncode == 0, done.stderr
    module, tokens = done.stdout.splitlines()[-2:]
    assert " transformers_modules" in module
    greedy = {**GREEDY, "max_new_tokens": 8}
    assert tokens == str(model.generate(prompt(12), **greedy).tolist())


def test_codes_are_nearer_the_original_than_numbers_of_more_bytes(tiny, converted):
    """On text like that of calibration, of which it has not seen this."""
    tokenizer = AutoTokenizer.from_pretrained(tiny())
    ids, distances = windows(read_texts([BUILT_IN]), tokenizer, 64, 8192)[-16:], []
    with torch.no_grad():
        original = load(tiny())(ids).logits.log_softmax(-1)
        for bits, ratio in (("auto", 0.25), ("16", 0.5)):
            folder = converted(**{**QUARTER, "bits": bits, "cache_ratio": ratio})
            found = load(folder, dtype=torch.float32)(ids).logits.log_softmax(-1)
            distances.append((original.exp() * (original - found)).sum(-1).mean().item())
    assert distances[0] < distances[1]  # 0.07 and 0.12


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_an_encoder_decoder_is_converted_to_codes(name, tmp_path):
    folder = encoder_decoders.build(name, tmp_path / "in")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(pair) + "\n" for pair in encoder_decoders.PAIRS))
    options = dict(calibration=[str(pairs)], dtype="bfloat16")
    plans = convert(str(folder), tmp_path / "out", **options).plans
    model = encoder_decoders.load(tmp_path / "out")
    ids = encoder_decoders.target(2)
    _, cache = stepwise(model, ids, 3)
    live = bytes_by_kind(cache)
    for kind, length in (("self", ids.shape[1]), ("cross", 11)):
        plan = plans[kind]
        assert 0.15 < plan.ratio <= 0.25 and all(s.keys.coded for s in plan.sites)
        assert live[kind] == 2 * length * plan.bytes_after


# ------------------------------------------------------------------------------------------- --bits


def widths_in(folder) -> set[int]:
    spec = json.loads((folder / "config.json").read_text())["lrkv"]
    sides = [layer for s in ("keys", "values") for layer in spec[s].get("codes", ())]
    return {bits for layer in sides for blocks in layer for bits, _ in blocks or ()}


@pytest.mark.parametrize(
    "asked, widths, ratio",
    [
        ((), {8, 6, 4, 3, 2}, 0.25),
        (("--bits", "auto", "--cache-ratio", "0.2"), {8, 6, 4, 3, 2}, 0.2),
        (("--bits", "16"), set(), 0.5),
        (("--bits", "8"), {8}, 0.25),
        (("--bits", "2, 8,4"), {8, 4, 2}, 0.25),
        (("--bits", "8", "--rank", "7"), {8}, (20 + 2 + 3 * (7 + 2)) / 120),
        (("--bits", "8", "--rank-k", "0", "--rank-v", "7", "--base-width", "0"), None, None),
        (("--bits", "4", "--base-width", "40", "--rank", "0"), {4}, 22 / 120),
        (("--rank", "7"), set(), 41 / 60),
        (("--keys", "rotary"), set(), 0.5),
    ],
    ids=str,
)
def test_bits(asked, widths, ratio, tiny, tmp_path):
    given = (tiny(), "--out", tmp_path / "out", "--calibration-tokens", 1024, "--dtype", "bfloat16")
    if widths is None:
        assert "out of range" in run("convert", *given, *asked, code=1).stderr
        return
    run("convert", *given, *asked)
    found = widths_in(tmp_path / "out")
    assert found <= widths and bool(found) == bool(widths)
    recipe = read_folder(tmp_path / "out").record.recipe
    assert recipe["bits"] == (asked[asked.index("--bits") + 1] if "--bits" in asked else "auto")
    kept = read_folder(tmp_path / "out").record.attention["self"].cache.kv_ratio
    if "--rank" in asked:
        assert kept == pytest.approx(ratio)
    else:
        assert 0.8 * ratio < kept <= ratio


@pytest.mark.parametrize(
    "asked, says",
    [
        (("--bits", "5"), "'5' is no width of codes"),
        (("--bits", "16,8"), "'16' is no width of codes"),
        (("--bits", "eight"), "auto, 16, or some of 8, 6, 4, 3, 2"),
        (("--bits", "8,4"), "one width of codes, not 8,4"),
        (("--bits", "3"), "keys: latents of 3 bits come in multiples of 8, not 20"),
        (("--bits", "4"), "keys: latents of 4 bits come in multiples of 2, not 7"),
        (("--bits", "8", "--calibration", "none"), "leave --calibration none"),
        (("--bits", "8", "--metric", "whitened"), "codes need to know"),
        (("--bits", "8", "--base", "aligned"), "codes go with the joint base only, not aligned"),
        (("--bits", "8", "--keys", "full"), "--keys full caches 16-bit numbers, not codes"),
        (("--bits", "8", "--keys", "rotary"), "--keys rotary caches 16-bit numbers"),
        (("--bits", "8,4", "--cache-ratio", "0.2", "--max-width-k", "20"), "limit of 16-bit"),
        (("--bits", "8", "--cache-ratio", "0.2", "--max-width-v", "20"), "limit of 16-bit"),
        (("--cache-ratio", "0.001"), "a cache ratio of 0.001 is below the smallest plan"),
        (("--bits", "8", "--cache-ratio", "0.03"), "below the smallest plan"),
    ],
    ids=str,
)
def test_bits_that_cannot_be(asked, says, source, tmp_path):
    refused(source, tmp_path / "out", *asked, says=says)


def test_keys_that_are_scaled_after_their_latents_make_no_codes(tmp_path):
    """OLMo-2: refused where bits are asked for, numbers where they are not."""
    folder = build("olmo2", tmp_path / "in")
    asked = ("--bits", "8", "--cache-ratio", "0.2")
    refused(folder, tmp_path / "out", *asked, says="olmo2 scales keys after their latents")
    plan = convert(str(folder), tmp_path / "out", dry_run=True, calibration_tokens=1024).plan
    assert 0.4 < plan.ratio <= 0.5
    assert not any(shape.coded for site in plan.sites for _, shape, _ in site.sides)


@pytest.mark.parametrize("dead", ["a head", "a layer"])
def test_dead_heads_convert(dead, source, tmp_path):
    """Heads without weights, as pruning leaves them."""
    tensors = load_file(source / "model.safetensors")
    for side in ("k_proj", "v_proj"):
        weight = tensors[f"model.layers.1.self_attn.{side}.weight"]
        weight[: 20 if dead == "a head" else None] = 0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    options = dict(dtype="bfloat16", calibration_tokens=1024)
    plan = convert(str(source), tmp_path / "out", **options).plan
    assert plan.ratio <= 0.25
    model = load(tmp_path / "out")
    output = model(prompt(20))
    assert output.logits.isfinite().all()
    assert cache_bytes(output.past_key_values) == 20 * plan.bytes_after
