"""Groups of heads with bases of codes of their own (`--head-group-size`), and how a CPU reads codes
without unpacking them.
"""

import pytest
import torch
from conftest import prompt, refused, relative, uneven
from test_caches import GREEDY, load, steps, whole
from test_channels import EXACT, Problem, as_keys, d, drawn, exact, unrounded
from transformers import DynamicCache, StaticCache

from lrkv_convert import convert, read_folder
from lrkv_convert.evaluate.memory import cache_bytes, formula_bytes
from lrkv_convert.fit.codes import WIDTHS
from lrkv_convert.forms import FORMS
from lrkv_convert.modeling import integer_lrkv as integer
from lrkv_convert.modeling.codes_lrkv import Codes
from lrkv_convert.modeling.factors_lrkv import LowRankHeads
from lrkv_convert.modeling.reference import decode

FITTED = [("joint", 0), ("joint", 20), ("commuting", 20)]
HEADS = 4


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("form, turning", FITTED)
def test_all_of_it_is_the_keys_but_for_rounding(form, turning, groups, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # `codes` works in float32
    problem = Problem(turning, H=HEADS)
    heads, _ = problem.fitted(form, HEADS // groups * d, groups=groups)
    x, keys, size = problem.x.unsqueeze(0), problem.keys(), problem.keys().abs().max()
    read = heads.rebuild(unrounded(heads, x, problem.rotation), problem.rotation)
    assert (read - keys).abs().max() < (1e-6 if form == "joint" else EXACT) * size
    assert relative(heads.matrices(), problem.W) < 1e-7
    assert heads.encode(x, problem.rotation)[0].shape[:3] == (1, groups, 401)


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("form, turning", FITTED)
def test_queries_meet_the_keys_that_are_rebuilt(form, turning, groups):
    problem, draw = Problem(turning, H=HEADS), drawn(1)
    heads, _ = problem.fitted(form, 16, 4, groups)
    cached = heads.encode(problem.x.unsqueeze(0), problem.rotation)
    keys = heads.rebuild(cached, problem.rotation)
    for queries in (1, 2, 5):
        q = draw(1, HEADS, queries, d)
        off = heads.scores(q, cached, problem.rotation) - q @ keys.mT
        # without rotation the bias is left out, which moves all scores of a query alike
        assert (off - off[..., :1]).abs().max() < EXACT * (q @ keys.mT).abs().max()
        weights = draw(1, HEADS, queries, len(problem.x)).softmax(-1)
        if not turning:
            assert relative(heads.average(weights, cached), weights @ keys) < EXACT


@pytest.mark.parametrize("form, turning", FITTED)
def test_smaller_groups_lose_more_and_are_counted_so(form, turning):
    """At as many latents, all of eight bits, and by curves that the fit keeps to."""
    problem, errors = Problem(turning, H=HEADS), []
    for groups in (1, 2, 4):
        _, fit = problem.fitted(form, 32 // groups, groups=groups)
        errors.append(fit.error)
        curve = FORMS[form].coded_curve(problem.W, problem.metric, WIDTHS, problem.geometry, groups)
        total = (problem.W @ problem.metric.M.root).square()
        assert all(shape.groups == groups for shape, _ in curve) and torch.isfinite(total).all()
        shape, loss = curve[len(curve) // 2]
        planned = FORMS[form].fit(
            problem.W, problem.b, problem.metric, shape, problem.geometry, "joint"
        )
        A = problem.W @ problem.metric.M.root
        whole_loss = (A * (problem.metric.sigma @ A)).sum().item()
        assert planned.error**2 * whole_loss == pytest.approx(loss, rel=0.05)
    assert errors[0] <= errors[1] <= errors[2]


def test_the_reference_reads_groups():
    problem, draw = Problem(0, H=HEADS), drawn(2)
    heads, _ = problem.fitted("joint", 16, 4, groups=2)
    cached = heads.encode(problem.x.unsqueeze(0))
    q = draw(1, HEADS, 2, d)
    expected = decode(heads, heads, q, cached, cached, None, None, 0.1)
    weights = (heads.scores(q, cached) * 0.1).softmax(-1)
    assert relative(heads.average(weights, cached), expected) < EXACT


# ------------------------------------------------------------------------------- models and caches


def grouped(form: str) -> dict:
    """Keys and values of three heads, each by itself or all together, unlike in each layer."""
    blocks = [[[8, 4], [2, 4]], [[6, 4], [4, 8]], [[4, 8]]]
    side = {
        "base_width": [8, 12, 8],
        "rank": [0, 0, 0],
        "alignment": True,
        "codes": [[of, None] for of in blocks],
        "groups": [3, 1, 3],
    }
    return {"keys": {**side, "form": form}, "values": {**side}}


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize(
    "form, family",
    [("joint", "llama"), ("joint", "gpt2"), ("joint", "qwen3"), ("turning", "llama")],
)
def test_cached_equals_uncached(form, family, kind, exact):
    model, ids = uneven(family, grouped(form)).double(), prompt(40, batch=2)
    centre(model)
    cache = (
        DynamicCache(config=model.config)
        if kind == "dynamic"
        else StaticCache(config=model.config, max_cache_len=48)
    )
    assert relative(steps(model, ids, cache), whole(model, ids)) < EXACT
    # layer by layer, keys and values alike: scales and codes of each group
    row = 2 * (3 * (2 + 4 + 1) + (2 + 3 + 4) + 3 * (2 + 4))
    assert cache_bytes(cache) == 2 * row * (40 if kind == "dynamic" else 48)
    assert formula_bytes(model.config, 8) == row
    padded = torch.cat((torch.full((1, 4), 258), ids[:1, :12]), 1)
    mask = (torch.arange(16) >= 4).long().unsqueeze(0)
    found = model.generate(padded, attention_mask=mask, **GREEDY)
    assert torch.equal(found[:, 16:], model.generate(ids[:1, :12], **GREEDY)[:, 12:])


def centre(model) -> None:
    """Put centres among latents, so that either is the nearer one of some tokens."""
    draw = drawn(3)
    for module in model.modules():
        constants = []
        if isinstance(module, Codes):
            constants = [module.centres, module.lift]
        elif isinstance(module, LowRankHeads) and module.bias is not None:
            constants = [module.bias]
        for constant in constants:
            constant.data.copy_(draw(*constant.shape))


@pytest.mark.parametrize(
    "family, keys", [("llama", "joint"), ("llama", "commuting"), ("gpt2", "joint")]
)
def test_a_conversion_in_groups_is_saved_and_loaded(family, keys, tiny, tmp_path, monkeypatch):
    plan = convert(
        str(tiny(family)),
        tmp_path / "out",
        keys=keys,
        cache_ratio=0.4,
        head_group_size=1,
        calibration_tokens=1024,
    ).plan
    assert plan.ratio <= 0.4 and all(site.keys.groups > 1 for site in plan.sites)
    folder = read_folder(tmp_path / "out")
    assert folder.attention["self"].values.groups == tuple(s.values.groups for s in plan.sites) or (
        folder.attention["self"].values.groups == [s.values.groups for s in plan.sites]
    )
    model, ids = load(tmp_path / "out", dtype=torch.float64), prompt(40)
    shapes = dict(model.state_dict())
    for layer in folder.record.attention["self"].layers:
        for name, shape in folder.tensors("self", layer.layer).items():
            assert tuple(shapes[f"{layer.path}.{name}"].shape) == shape
    monkeypatch.setattr(torch, "float32", torch.float64)  # as `exact`
    cache = DynamicCache(config=model.config)
    assert relative(steps(model, ids, cache), whole(model, ids)) < EXACT
    assert cache_bytes(cache) == 40 * plan.bytes_after


@pytest.mark.parametrize(
    "options, says",
    [
        (["--head-group-size", "1", "--bits", "16"], "goes with a budget of codes"),
        (["--head-group-size", "1", "--rank", "3"], "goes with a budget of codes"),
        (["--head-group-size", "1", "--keys", "channels"], "knows no groups"),
        (["--head-group-size", "0"], "a group of 0 heads has none"),
        (["--head-group-size", "2"], "do not fall into groups of 2"),
    ],
    ids=str,
)
def test_groups_that_cannot_be(options, says, source, tmp_path):
    budget = [] if "--rank" in options else ["--cache-ratio", "0.4"]
    refused(source, tmp_path / "out", *budget, *options, says=says)


@pytest.mark.parametrize("groups", [2, 0, -1])
def test_a_config_that_cannot_be(groups):
    spec = grouped("joint")
    spec["keys"]["groups"] = [groups] * 3
    with pytest.raises(ValueError, match="do not share bases"):
        uneven(lrkv=spec)


# ------------------------------------------------------------------------------- integer products

BLOCKS = [
    ((8, 5),),
    ((4, 6),),
    ((3, 16),),
    ((2, 8),),
    ((8, 3), (6, 8), (4, 2), (3, 8), (2, 4)),
    ((6, 12), (3, 24)),
    ((4, 128), (2, 32)),
]


def coded(blocks, heads: int, tokens: int) -> tuple[Codes, torch.Tensor]:
    width, draw = sum(n for _, n in blocks), drawn(4)
    coder = Codes(blocks, width, heads, heads, 8).requires_grad_(False)
    coder.centres.copy_(draw(*coder.centres.shape))
    return coder, coder.pack(draw(2, heads, tokens, width))


@pytest.mark.parametrize("n", [1, 3, 4])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_bytes_give_what_codes_give(blocks, heads, n):
    coder, rows = coded(blocks, heads, 150)
    read, draw = coder.read(rows, torch.float64), drawn(5)
    assert (read[..., -1] > 0).any() and (read[..., -1] == 0).any()
    queries = draw(2, heads, n, coder.width + 1)
    weights = (3 * draw(2, heads, n, 150)).softmax(-1)
    assert integer.reads(rows, queries.float()) and not integer.reads(rows, queries)
    for dtype, near in ((torch.float32, 3e-6), (torch.bfloat16, 1e-2)):
        met = coder.dot(queries.to(dtype), rows)
        assert met.dtype == dtype and relative(met.double(), queries @ read.mT) < near
        mixed = coder.mix(weights.to(dtype), rows)
        assert mixed.dtype == dtype and relative(mixed.double(), weights @ read) < near
    # of a static cache, where rows of a head are a part of more, and begin anywhere
    wide = torch.cat((rows, rows), dim=2)[:, :, 1:151]
    moved = torch.cat((rows[:, :, 1:], rows[:, :, :1]), dim=2)
    assert torch.equal(coder.dot(queries.float(), wide), coder.dot(queries.float(), moved))


@pytest.mark.parametrize("blocks", [BLOCKS[0], BLOCKS[4]], ids=str)
def test_parts_are_joined(blocks):
    coder, rows = coded(blocks, 2, 700)
    draw = drawn(6)
    y, a = draw(2, 2, 3, coder.width).float(), draw(2, 2, 3, 700).float()
    met = integer.dot(coder.layout, y, rows)
    assert relative(integer.dot(coder.layout, y, rows, chunk=1), met) < 1e-6
    scale = coder.scales(rows).abs().mT
    mix = lambda **how: integer.mix(coder.layout, a, scale, rows, **how)
    assert relative(mix(chunk=1), mix()) < 1e-5
    assert relative(mix(chunk=1, flush=100), mix()) < 1e-5


def test_long_sums_of_large_numbers_do_not_overflow():
    coder, rows = coded(((8, 2),), 1, 1)
    rows = rows[:1].expand(1, 1, 150_000, -1).contiguous()
    for byte in (0, 255):
        rows[..., 2:] = byte
        mixed = coder.mix(torch.ones(1, 1, 1, 150_000), rows)
        assert relative(mixed.double(), coder.read(rows, torch.float64).sum(2, True)) < 1e-6


def test_gradients_go_past_the_products():
    coder, rows = coded(((4, 6),), 1, 20)
    queries = drawn(7)(2, 1, 1, 7).float().requires_grad_()
    coder.dot(queries, rows).sum().backward()
    assert relative(queries.grad, coder.read(rows, torch.float32).sum(2, True)) < 1e-6


def test_memory_of_inference_mode_is_used_outside_of_it():
    coder, rows = coded(((6, 12),), 2, 40)
    queries = drawn(8)(2, 2, 3, 13).float()
    integer.scratch.held.clear()
    with torch.inference_mode():
        first = coder.dot(queries, rows)
    with torch.no_grad():
        assert torch.equal(coder.dot(queries, rows), first)
    assert torch.equal(coder.dot(queries, rows), first)
