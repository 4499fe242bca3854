"""Rebuild, split and kernel paths compute the same attention, and the choice between them is the
documented one.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import THOROUGH, prompt, relative
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

from lrkv_convert.evaluate.step import Layer, Shape
from lrkv_convert.modeling import attention_lrkv, factors_lrkv, reference
from lrkv_convert.modeling.attention_lrkv import choose_path
from lrkv_convert.modeling.factors_lrkv import LowRankHeads
from lrkv_convert.modeling.forms_lrkv import FORMS
from lrkv_convert.modeling.kernel_lrkv import decode, missing

# of the root mean square, against float64; bfloat16 rounds each factor to 8 bits and the weights of
# the softmax once more
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
CPU = torch.device("cpu")
# where the kernel runs: TRITON_INTERPRET=0 on a machine with a GPU takes it there
DEVICE = torch.device(
    "cuda" if torch.cuda.is_available() and os.environ["TRITON_INTERPRET"] == "0" else "cpu"
)

# keys (m, r, alignment, form), values (m, r), G, biases, width of RoPE, QK-norm; H = 3, d = 20
CASES = {
    "position-free": ((20, 7, True, "joint"), (24, 5), 1, False, 0, False),
    "position-free-bias-groups": ((33, 7, True, "joint"), (24, 5), 2, True, 0, False),
    "position-free-paper": ((20, 7, False, "joint"), (0, 5), 1, False, 0, False),
    "rope": ((20, 7, True, "joint"), (24, 5), 1, False, 20, False),
    "rope-bias-groups": ((20, 7, True, "joint"), (24, 0), 4, True, 20, False),
    "rope-partial": ((16, 7, True, "joint"), (0, 5), 1, True, 12, False),
    "rope-partial-groups": ((16, 7, True, "joint"), (150, 5), 2, False, 12, False),
    "rope-per-head": ((0, 7, True, "joint"), (24, 5), 1, False, 20, False),
    "rope-latent": ((150, 0, True, "joint"), (40, 0), 2, False, 20, False),
    "rope-paper": ((20, 7, False, "joint"), (20, 5), 1, True, 20, False),
    "rope-one-base": ((20, 0, False, "joint"), (20, 5), 2, True, 20, False),
    "rope-qk-norm": ((20, 7, True, "joint"), (24, 5), 1, True, 20, True),
    "rope-qk-norm-groups": ((20, 7, False, "joint"), (24, 5), 2, False, 12, True),
    "qk-norm": ((20, 7, True, "joint"), (24, 5), 1, False, 0, True),
    "rotary": ((20, 7, False, "rotary"), (24, 5), 1, True, 20, False),
    "rotary-groups": ((20, 7, False, "rotary"), (24, 5), 2, False, 20, False),
    "commuting": ((32, 0, True, "commuting"), (24, 5), 1, True, 20, False),
    "commuting-groups": ((60, 0, True, "commuting"), (0, 6), 4, False, 20, False),
    "full": ((0, 20, False, "full"), (24, 5), 1, True, 20, False),
    "full-groups": ((0, 20, False, "full"), (0, 6), 4, False, 20, False),
}


class Norm(nn.Module):
    """As the RMSNorm of transformers, but in the type it is given."""

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.variance_epsilon = (
            nn.Parameter(torch.rand(width) + 0.5, requires_grad=False),
            1e-5,
        )

    def forward(self, x):
        return self.weight * (
            x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        )


def problem(
    case: str, tokens: int, batch: int = 2, masked: bool = True, dtype=torch.float32
) -> dict:
    """Random weights, queries and caches; the arguments of `decode`."""
    (m, r, alignment, form), (v_m, v_r), G, biased, turning, normed = CASES[case]
    torch.manual_seed(tokens)
    H, d = 3, 20
    keys, values = (
        FORMS[form](8, H, d, m, r, alignment, biased),
        LowRankHeads(8, H, d, v_m, v_r, True, biased),
    )
    for parameter in [*keys.parameters(), *values.parameters()]:
        nn.init.normal_(parameter, std=0.3)
    new = lambda *shape: torch.randn(shape).to(dtype)
    rotation = mask = None
    if turning:
        angles = torch.arange(tokens)[:, None] * 100.0 ** (
            -torch.arange(turning // 2) / (turning // 2)
        )
        angles = torch.cat((angles, angles), dim=-1)[None]
        rotation = angles.cos().to(dtype), angles.sin().to(dtype)
    if masked:
        hidden = torch.rand(batch, 1, 1, tokens) < 0.3
        hidden[..., -1] = False
        mask = torch.zeros(batch, 1, 1, tokens, dtype=dtype).masked_fill(
            hidden, torch.finfo(dtype).min
        )
    return {
        "keys": keys.to(dtype).requires_grad_(False),
        "values": values.to(dtype).requires_grad_(False),
        "query": new(batch, H, G, d),
        "cached_keys": tuple(new(batch, h, tokens, width) for h, width in keys.slots()),
        "cached_values": tuple(new(batch, h, tokens, width) for h, width in values.slots()),
        "rotation": rotation,
        "mask": mask,
        "scale": d**-0.5,
        "norm": Norm(d).to(dtype) if normed else None,
    }


def kernel(**given) -> torch.Tensor:
    """`decode` on DEVICE."""
    move = lambda v: (
        tuple(map(move, v))
        if isinstance(v, tuple)
        else v.to(DEVICE)
        if isinstance(v, (torch.Tensor, nn.Module))
        else v
    )
    found = decode(**{name: move(value) for name, value in given.items()}).cpu()
    for name in ("keys", "values"):
        given[name].cpu()
    return found


def split(keys, values, query, cached_keys, cached_values, rotation, mask, scale, norm):
    scores = keys.scores(query * scale, cached_keys, rotation, norm)
    return values.average((scores if mask is None else scores + mask).softmax(-1), cached_values)


def rebuild(keys, values, query, cached_keys, cached_values, rotation, mask, scale, norm):
    k, v = (
        keys.rebuild(cached_keys, rotation, norm),
        values.rebuild(cached_values),
    )
    scores = query @ k.mT * scale
    return (scores if mask is None else scores + mask).softmax(-1) @ v


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape and torch.isfinite(found).all()
    return ((found.double() - expected).square().mean() / expected.square().mean()).sqrt().item()


@pytest.mark.parametrize("tokens", [1, 2, 63, 111, 1000])
@pytest.mark.parametrize("case", CASES)
def test_split_and_rebuild_equal_the_reference(case, tokens):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        given = problem(case, tokens, dtype=dtype)
        expected = reference.decode(**given)
        assert error(split(**given), expected) < TOLERANCE[dtype], dtype
        assert error(rebuild(**given), expected) < TOLERANCE[dtype], dtype


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 63, 111])
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_equals_the_reference(case, tokens):
    given = problem(case, tokens)
    assert error(kernel(**given), reference.decode(**given)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    "case", ["position-free-bias-groups", "rope", "rope-qk-norm-groups", "rotary", "full"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_in_half_precision(case, dtype):
    given = problem(case, 130, batch=1, masked=False, dtype=dtype)
    assert error(kernel(**given), reference.decode(**given)) < TOLERANCE[dtype]


@pytest.mark.parametrize("case", ["position-free", "rope-bias-groups"])
def test_the_kernel_joins_many_chunks(case):
    """With one program wanted the sequence is one chunk, with many it is cut as finely as tiles
    allow: the result is the same.
    """
    given = problem(case, 1000, batch=1)
    fine = kernel(**given)
    assert error(kernel(**given, programs=1), fine.double()) < TOLERANCE[torch.float32]
    assert error(fine, reference.decode(**given)) < TOLERANCE[torch.float32]


def test_the_kernel_reads_caches_that_are_slices():
    """A static cache grown beyond what is used, and a batch taken from a larger one, are not
    contiguous.
    """
    given = problem("rope", 63)
    widened = [
        tuple(torch.cat((t, torch.full_like(t, float("nan"))), dim=2)[:, :, :63] for t in side)
        for side in (given["cached_keys"], given["cached_values"])
    ]
    assert not widened[0][1].is_contiguous()
    found = kernel(**{**given, "cached_keys": widened[0], "cached_values": widened[1]})
    assert torch.equal(found, kernel(**given))


def test_the_kernel_writes_all_it_allocates(monkeypatch):
    """Buffers that start as NaN end without one."""
    given = problem("rope-bias-groups", 111)
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan"))
    )
    assert torch.isfinite(kernel(**given)).all()


# ---------------------------------------------------------------------------------------- in models

CONVERSIONS = [
    {},
    {"rank_k": 0, "rank_v": 12},
    {"base": "aligned"},
    {"keys": "per-head", "cache_ratio": 0.7},
    {"keys": "rotary", "cache_ratio": 0.8},
    {"keys": "commuting", "cache_ratio": 0.7},
    {"keys": "full", "cache_ratio": 0.8},
]


@torch.no_grad()
def decoded(model, path: str, ids, mask=None, first: int = 30) -> torch.Tensor:
    """Logits of a prefill and of one token at a time, through one path."""
    model.config.lrkv_path, cache = path, DynamicCache(config=model.config)
    mask = torch.ones_like(ids) if mask is None else mask
    pieces = [model(ids[:, :first], past_key_values=cache, attention_mask=mask[:, :first]).logits]
    for t in range(first, ids.shape[1]):
        pieces.append(
            model(ids[:, t : t + 1], past_key_values=cache, attention_mask=mask[:, : t + 1]).logits
        )
    return torch.cat(pieces, dim=1)


# a model without RoPE is refused the forms of keys that need it (test_refusals.py)
@pytest.mark.slow
@pytest.mark.parametrize(
    "family, options",
    [
        (f, o)
        for f in THOROUGH
        for o in CONVERSIONS
        if f != "gpt2" or o.get("keys") not in ("rotary", "commuting")
    ],
    ids=str,
)
def test_forced_paths_give_the_same_logits(family, options, converted):
    options = {"rank": None, **options} if "cache_ratio" in options else options
    model = AutoModelForCausalLM.from_pretrained(converted(family, **options)).eval()
    ids, mask = prompt(33, batch=2), torch.ones(2, 33, dtype=torch.long)
    mask[1, :9] = 0
    expected = decoded(model, "rebuild", ids, mask)
    for path in ("split", "kernel", "auto"):
        found = decoded(model, path, ids, mask)
        assert (
            relative(found[0], expected[0]) < 1e-4
            and relative(found[1, 9:], expected[1, 9:]) < 1e-4
        ), path


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_split_prefill_and_chunks_equal_rebuilding(family, attention, converted):
    """The split path forced on several tokens at once, with and without tokens before them, sees
    what rebuilding sees.
    """
    model = AutoModelForCausalLM.from_pretrained(
        converted(family), attn_implementation=attention
    ).eval()
    ids, out = prompt(40, batch=2), []
    for path in ("rebuild", "split"):
        model.config.lrkv_path, cache = path, DynamicCache(config=model.config)
        with torch.no_grad():
            out.append(
                torch.cat(
                    [
                        model(part, past_key_values=cache).logits
                        for part in ids.split([17, 5, 18], dim=1)
                    ],
                    dim=1,
                )
            )
    assert relative(*out) < 1e-4


def test_eager_attention_weights_come_from_either_path(converted):
    model = AutoModelForCausalLM.from_pretrained(converted(), attn_implementation="eager").eval()
    seen = []
    for path in ("rebuild", "split"):
        model.config.lrkv_path, cache = path, DynamicCache(config=model.config)
        model(prompt(20), past_key_values=cache)
        seen.append(
            torch.stack(model(prompt(1), past_key_values=cache, output_attentions=True).attentions)
        )
    assert seen[0].shape == (2, 1, 6, 1, 21) and relative(*seen) < 1e-5


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[] if f in ("llama", "gpt2") else pytest.mark.slow) for f in THOROUGH],
)
def test_a_large_batch_row_by_row_is_what_rebuilding_sees(family, converted):
    """Two rows padded differently, of so many scores that the split path takes one at a time."""
    model = AutoModelForCausalLM.from_pretrained(
        converted(family), attn_implementation="eager"
    ).eval()
    T = math.isqrt(attention_lrkv.SCORES // (2 * model.config.num_attention_heads)) + 1
    ids, mask = prompt(T + 2, batch=2), torch.ones(2, T + 2, dtype=torch.long)
    mask[1, :5] = 0
    split, rebuilt = (decoded(model, path, ids, mask, first=T) for path in ("split", "rebuild"))
    assert relative(split[0], rebuilt[0]) < 1e-4
    assert relative(split[1, 5:], rebuilt[1, 5:]) < 1e-4


@pytest.mark.parametrize(
    "case", ["rope", "rope-bias-groups", "rope-partial", "rope-per-head", "rope-qk-norm", "full"]
)
def test_keys_chunk_by_chunk_equal_the_reference(case):
    """As many tokens as a CPU rebuilds keys of in two chunks, the second one shorter."""
    tokens = factors_lrkv.CHUNK // (3 * 20) + 100
    given = problem(case, tokens)
    assert error(split(**given), reference.decode(**given)) < TOLERANCE[torch.float32]


def test_a_padding_query_in_half_precision_gives_no_nan():
    """It sees masked keys only; where all its scores are far below zero, adding the mask in float16
    would leave nothing but -inf.
    """
    layer = Layer(Shape(2, 1, 16, (0, 16), (16, 4), form="full"), 1, 5, CPU, torch.float16)
    layer.cached[0][1].fill_(1)
    layer.query.fill_(-20)
    output, weights = layer.read_in_place(
        "split",
        layer.query,
        *layer.cached,
        torch.full((1, 1, 1, 5), torch.finfo(torch.float16).min),
        None,
        with_weights=True,
    )
    assert torch.isfinite(output).all() and torch.allclose(
        weights, torch.full_like(weights, 0.2), atol=1e-3
    )


def test_gradients_flow_through_a_cached_step(converted):
    """In eval mode, too; the kernel has none, so it steps aside."""
    grads = []
    for path in ("rebuild", "split", "kernel"):
        model = AutoModelForCausalLM.from_pretrained(converted(), lrkv_path=path).eval()
        cache = DynamicCache(config=model.config)
        model(prompt(20), past_key_values=cache)
        model(prompt(1), past_key_values=cache).logits.square().sum().backward()
        grads.append([p.grad for p in model.model.layers[0].parameters()])
    for other in grads[1:]:
        assert all(relative(a, b) < 1e-3 for a, b in zip(other, grads[0], strict=True))


def test_gradients_reach_one_factor_alone(converted):
    """With all else frozen the query carries no gradient, and the kernel must step aside all the
    same.
    """
    grads = []
    for path in ("rebuild", "kernel"):
        model = (
            AutoModelForCausalLM.from_pretrained(converted(), lrkv_path=path)
            .eval()
            .requires_grad_(False)
        )
        factor = model.model.layers[0].self_attn.keys.B.requires_grad_(True)
        cache = DynamicCache(config=model.config)
        model(prompt(20), past_key_values=cache)
        model(prompt(1), past_key_values=cache).logits.square().sum().backward()
        grads.append(factor.grad)
    assert relative(*grads) < 1e-3


def test_autocast_reaches_the_kernel(converted):
    out = []
    for path in ("rebuild", "kernel"):
        model = AutoModelForCausalLM.from_pretrained(converted(), lrkv_path=path).eval()
        cache = DynamicCache(config=model.config)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(prompt(20), past_key_values=cache)
            out.append(model(prompt(1), past_key_values=cache).logits.float())
    assert relative(*out) < 0.1


def test_the_path_is_chosen_as_documented():
    usual = dict(
        asked="auto",
        queries=2,
        tokens=1,
        implementation="sdpa",
        mask=None,
        training=False,
        cached=True,
        device=CPU,
        dtype=torch.float32,
    )
    choose = lambda **changed: choose_path(**{**usual, **changed})
    assert choose() == "split"
    assert (
        choose(queries=64, tokens=32) == choose(training=True) == choose(cached=False) == "rebuild"
    )
    assert choose(asked="split", queries=64, tokens=32) == "split"
    assert choose(asked="split", training=True) == choose(asked="rebuild") == "rebuild"
    assert choose(implementation="flash_attention_2") == "split"
    assert (
        choose(asked="split", implementation="paged|sdpa", cached=False)
        == choose(implementation="my_own")
        == "rebuild"
    )
    assert (
        choose(implementation="flash_attention_2", tokens=4)
        == choose(implementation="flash_attention_2", outside_window=True)
        == "rebuild"
    )
    assert choose(mask=object()) == "rebuild"  # flex attention's block mask
    assert choose(asked="kernel") == "kernel" and choose(asked="kernel", tokens=2) == "split"
    assert choose(asked="kernel", mask=torch.zeros(1, 6, 1, 9)) == "split"  # a mask per head
    cuda = dict(device=torch.device("cuda"), dtype=torch.bfloat16)
    assert choose(**cuda, differentiable=True) == choose(**cuda, implementation="eager") == "split"
    assert (
        choose(**cuda) == "kernel"
        and choose(**cuda, tokens=2) == choose(**{**cuda, "dtype": torch.float64}) == "split"
    )
    with pytest.raises(ValueError, match="must be one of"):
        choose(asked="fastest")
    with pytest.raises(ValueError, match="float64"):
        choose(asked="kernel", dtype=torch.float64)


def test_the_path_can_be_given_when_loading(converted):
    assert (
        AutoModelForCausalLM.from_pretrained(converted(), lrkv_path="rebuild").config.lrkv_path
        == "rebuild"
    )


def test_without_triton_the_kernel_says_what_it_lacks(monkeypatch):
    from lrkv_convert.modeling import kernel_lrkv

    assert missing(CPU, torch.float32) is None  # interpreted
    monkeypatch.setattr(kernel_lrkv, "INTERPRETED", False)
    assert "no cpu backend" in missing(CPU, torch.bfloat16)
    assert "half precision" in missing(torch.device("cuda"), torch.float32)
    monkeypatch.setattr(kernel_lrkv, "triton", None)
    assert "not installed" in missing(torch.device("cuda"), torch.bfloat16)


# ------------------------------------------------------------------------------------ ahead of time


@pytest.mark.slow
def test_the_kernel_compiles_without_spilling():
    """Every launch of the table for sm_80 and sm_90; no GPU needed."""
    script = Path(__file__).parent.parent / "benchmarks" / "kernel_resources.py"
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    # a heading, and for each shape a line and three launches
    assert len(done.stdout.splitlines()) == 1 + 15 * (1 + 2 * 3)


@pytest.mark.slow
def test_a_spill_would_be_seen():
    """The same kernel held to 32 registers spills, and the table says so."""
    code = (
        "import sys; sys.path.insert(0, 'benchmarks')\nimport torch, kernel_resources as k\nkernel,"
        " args, options = k.launches(k.CASES['RoPE joint, 32 heads, r 60'],"
        " torch.bfloat16)[0]\nprint(k.resources(k.compiled(kernel, args, options, 80,"
        " maxnreg=32))[2])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0 and int(done.stdout) > 0, done.stdout + done.stderr
