"""The kernel reads codes as the reference does, which takes them apart bit by bit; so do the split
and the rebuild path.
"""

import pytest
import torch
from conftest import THOROUGH, prompt, relative
from test_paths import TOLERANCE, Norm, decoded, error, kernel, rebuild, split
from torch import nn
from transformers import AutoModelForCausalLM

from lrkv_convert.modeling import attention_lrkv, kernel_lrkv, reference
from lrkv_convert.modeling.codes_lrkv import Blocks, Codes
from lrkv_convert.modeling.factors_lrkv import LowRankHeads

H, D_HEAD = 3, 20
# one width alone, and several: 3 and 6 bits lie in two planes, which others share
WIDTHS: dict[str, Blocks] = {
    "8": ((8, 5),),
    "6": ((6, 12),),
    "4": ((4, 18),),
    "3": ((3, 24),),
    "2": ((2, 20),),
    "8-6-4-3-2": ((8, 3), (6, 4), (4, 6), (3, 8), (2, 12)),
    "6-3": ((6, 8), (3, 16)),
    "4-3": ((4, 10), (3, 8)),
    "6-2": ((6, 4), (2, 4)),
    "wide": ((8, 70), (6, 132), (3, 72)),  # more than one tile of latents, and of tokens
}
FEW = ((4, 6), (3, 8))
MANY = WIDTHS["8-6-4-3-2"]

# codes of keys (base, residual) and of values: blocks, or the width of what is numbers
Side = tuple[Blocks | int, Blocks | int]
# name -> keys, values, G, biases, width of RoPE, QK-norm
CASES: dict[str, tuple[Side, Side, int, bool, int, bool]] = {
    **{
        f"rope {name}": ((blocks, 0), (blocks, 0), 1, False, D_HEAD, False)
        for name, blocks in WIDTHS.items()
    },
    **{
        f"direct {name}": ((blocks, 0), (blocks, 0), 2, False, 0, False)
        for name, blocks in WIDTHS.items()
    },
    "rope residual": ((MANY, FEW), (MANY, FEW), 2, True, D_HEAD, False),
    "rope residual alone": ((0, MANY), (0, MANY), 1, True, D_HEAD, False),
    "rope qk-norm groups": ((MANY, FEW), (FEW, 0), 4, True, D_HEAD, True),
    "rope partial": ((MANY, 0), (FEW, 0), 2, False, 12, False),
    "qk-norm": ((FEW, MANY), (0, FEW), 1, False, 0, True),
    "direct residual": ((MANY, FEW), (MANY, FEW), 2, True, 0, False),
    "direct residual alone": ((0, FEW), (0, MANY), 4, False, 0, False),
    "keys alone": ((MANY, FEW), (24, 5), 2, False, D_HEAD, False),
    "values alone": ((20, 7), (MANY, FEW), 2, False, D_HEAD, False),
    "base alone": ((MANY, 7), (FEW, 5), 2, True, D_HEAD, False),
    "residual of numbers' base": ((20, FEW), (24, MANY), 2, True, D_HEAD, False),
    "direct base alone": ((MANY, 7), (FEW, 5), 1, True, 0, False),
    "direct residual of numbers' base": ((20, FEW), (24, MANY), 1, True, 0, False),
}
FAST = ("rope 8-6-4-3-2", "direct 8-6-4-3-2", "rope residual", "direct residual", "base alone")


def sized(cases, fast=FAST) -> list:
    """As parameters, those that are not fast marked slow."""
    return [pytest.param(c, marks=[] if c in fast else pytest.mark.slow) for c in cases]


def side(shape: Side, biased: bool) -> LowRankHeads:
    """Keys or values with random factors."""
    widths = [s if isinstance(s, int) else sum(n for _, n in s) for s in shape]
    codes = [None if isinstance(s, int) else s for s in shape]
    heads = LowRankHeads(8, H, D_HEAD, *widths, True, biased, codes)
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=0.3)
    return heads.requires_grad_(False)


def cached(heads: LowRankHeads, batch: int, tokens: int, dtype) -> tuple:
    """Slots (N, heads, S, width) of random latents; of codes every fifth token is a sink."""
    found = []
    for (of, width), coder in zip(heads.latents(), heads.coders, strict=True):
        z = torch.randn(batch, of, tokens, width)
        if coder is None:
            found.append(z.to(dtype))
            continue
        z = z + coder.centres[0].float()[:, None]
        z[:, :, ::5] = coder.centres[1].float()[:, None] + 0.2 * torch.randn_like(z[:, :, ::5])
        rows = coder.pack(z)
        assert width < 4 or (coder.unpacked(rows)[1] < 0).any()
        found.append(rows)
    return tuple(found)


def problem(
    case: str, tokens: int, batch: int = 2, masked: bool = True, dtype=torch.float32
) -> dict:
    """Random weights, queries and codes; the arguments of `decode`."""
    of_keys, of_values, G, biased, turning, normed = CASES[case]
    torch.manual_seed(tokens)
    keys, values = (side(shape, biased).to(dtype) for shape in (of_keys, of_values))
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
        "keys": keys,
        "values": values,
        "query": torch.randn(batch, H, G, D_HEAD).to(dtype),
        "cached_keys": cached(keys, batch, tokens, dtype),
        "cached_values": cached(values, batch, tokens, dtype),
        "rotation": rotation,
        "mask": mask,
        "scale": D_HEAD**-0.5,
        "norm": Norm(D_HEAD).to(dtype) if normed else None,
    }


@pytest.mark.parametrize("blocks", WIDTHS.values(), ids=WIDTHS)
def test_the_reference_takes_rows_apart_as_they_were_packed(blocks):
    coder = Codes(blocks, sum(n for _, n in blocks), 2, H, D_HEAD).requires_grad_(False)
    nn.init.normal_(coder.centres)
    rows = coder.pack(torch.randn(2, 2, 9, coder.width))
    expected = coder.read(rows, torch.float32).double()
    assert torch.allclose(reference._decoded(rows, coder.blocks), expected, rtol=1e-6)


@pytest.mark.parametrize("case", sized(CASES))
def test_the_kernel_reads_codes(case):
    """At a length that is no multiple of a tile."""
    given = problem(case, 111)
    assert error(kernel(**given), reference.decode(**given)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("case", sized(["rope residual", "direct residual", "rope 8", "direct 3"]))
@pytest.mark.parametrize("tokens", [1, 64, 130])
def test_the_kernel_reads_codes_at_other_lengths(case, tokens):
    given = problem(case, tokens, batch=1)
    assert error(kernel(**given), reference.decode(**given)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("case", sized(["rope residual", "direct residual", "rope wide"]))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_reads_codes_in_half_precision(case, dtype):
    given = problem(case, 70, batch=1, masked=False, dtype=dtype)
    assert error(kernel(**given), reference.decode(**given)) < TOLERANCE[dtype]


@pytest.mark.parametrize("case", sized(CASES))
def test_split_and_rebuild_read_codes(case):
    given = problem(case, 111)
    expected = reference.decode(**given)
    assert error(split(**given), expected) < TOLERANCE[torch.float32]
    assert error(rebuild(**given), expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("case", sized(["rope residual", "direct residual", "rope wide"], ()))
def test_chunks_of_codes_are_joined(case):
    given = problem(case, 400, batch=1)
    fine = kernel(**given)
    assert error(kernel(**given, programs=1), fine.double()) < TOLERANCE[torch.float32]
    assert error(fine, reference.decode(**given)) < TOLERANCE[torch.float32]


def test_rows_that_are_slices_of_a_larger_cache():
    """Of a static cache grown beyond what is used; rows begin at any byte."""
    given = problem("rope residual", 63)
    assert any(held.shape[-1] % 2 for held in given["cached_keys"])
    widened = {
        name: tuple(
            torch.cat((held, torch.full_like(held, 255)), dim=2)[:, :, :63] for held in given[name]
        )
        for name in ("cached_keys", "cached_values")
    }
    assert torch.equal(kernel(**{**given, **widened}), kernel(**given))


@pytest.mark.parametrize("case", ["rope residual", "direct residual"])
def test_what_was_never_made_codes_is_read_with_the_mark_of_sinks(case):
    """Where nothing is cached, latents keep their numbers and the mark beside them."""
    given = problem(case, 63, batch=1)
    for name in ("keys", "values"):
        held = given[name].read(given[f"cached_{name}"])
        assert held[0].dtype == torch.float32
        assert held[0].shape[-1] == given[name].base_width + 1
        given[f"cached_{name}"] = tuple(held)
    assert error(kernel(**given), reference.decode(**given)) < TOLERANCE[torch.float32]


def test_sinks_differ_by_their_mark_alone():
    """A row with the sign of its scale turned is read with the lift in addition."""
    given = problem("direct 4-3", 9, batch=1, masked=False)
    plain = reference.decode(**given)
    rows = given["cached_values"][0].clone()
    rows[..., 1] ^= 0x80
    given["cached_values"] = (rows, given["cached_values"][1])
    turned = reference.decode(**given)
    assert error(kernel(**given), turned) < TOLERANCE[torch.float32]
    assert (turned - plain).abs().max() > 0.1


@pytest.mark.parametrize("family", sized(THOROUGH, ("llama",)))
def test_a_converted_model_decodes_its_codes_through_the_kernel(family, converted, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(
        converted(family, cache_ratio=0.2, rank=None, bits="auto")
    ).eval()
    assert all(
        m.keys.coded and m.values.coded
        for m in model.modules()
        if isinstance(getattr(m, "keys", None), nn.Module)
    )
    ids, mask = prompt(32, batch=2), torch.ones(2, 32, dtype=torch.long)
    mask[1, :9] = 0
    expected = decoded(model, "split", ids, mask)
    calls = []
    monkeypatch.setattr(
        attention_lrkv, "decode", lambda *args: calls.append(args) or kernel_lrkv.decode(*args)
    )
    found = decoded(model, "kernel", ids, mask)
    assert len(calls) == 2 * model.config.num_hidden_layers
    assert relative(found[0], expected[0]) < 1e-4
    assert relative(found[1, 9:], expected[1, 9:]) < 1e-4
