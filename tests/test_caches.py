"""Every cache of transformers holds the small cache: same tokens or the same logits, and the bytes
of the formula.
"""

import pytest
import torch
from conftest import CONFIGS, UNEVEN, prompt, relative, uneven
from transformers import AutoModelForCausalLM, DynamicCache, QuantizedCache, StaticCache

from lrkv_convert.evaluate.memory import cache_bytes, formula_bytes
from lrkv_convert.modeling import FAMILIES
from lrkv_convert.modeling.cache_lrkv import with_pairs

GREEDY = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=258)


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()


@torch.no_grad()
def steps(model, ids, cache, first: int = 30) -> torch.Tensor:
    """Logits of the tokens after `first`, one at a time."""
    model(ids[:, :first], past_key_values=cache)
    return torch.cat(
        [
            model(ids[:, t : t + 1], past_key_values=cache).logits
            for t in range(first, ids.shape[1])
        ],
        dim=1,
    )


@torch.no_grad()
def whole(model, ids, first: int = 30) -> torch.Tensor:
    return model(ids, use_cache=False).logits[:, first:]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layers_of_every_shape_in_one_model(family, kind):
    model, ids = uneven(family), prompt(40, batch=2)
    cache = (
        DynamicCache(config=model.config)
        if kind == "dynamic"
        else StaticCache(config=model.config, max_cache_len=48)
    )
    assert relative(steps(model, ids, cache), whole(model, ids)) < 1e-4
    held = sum(
        m + 3 * r for side in UNEVEN.values() for m, r in zip(side["base_width"], side["rank"])
    )
    assert formula_bytes(model.config, 4) == 4 * held
    assert cache_bytes(cache) == 4 * held * 2 * (40 if kind == "dynamic" else 48)


# ---------------------------------------------------------------------------------------- quantised

QUANTISED = {
    "fp8": dict(backend="fp8"),
    "hqq": dict(
        backend="hqq", nbits=8, axis_key=1, axis_value=1, q_group_size=4, residual_length=8
    ),
    "quanto": dict(backend="quanto", nbits=4, q_group_size=4, residual_length=8),
}
# quanto compiles itself when it is first used
BACKENDS = [pytest.param(b, marks=pytest.mark.slow if b == "quanto" else []) for b in QUANTISED]


@pytest.mark.parametrize("backend", BACKENDS)
def test_quantised_caches(backend, tiny):
    """As near the exact logits as the original's quantised cache comes to the original's, and as
    much smaller; uneven layers too.
    """
    if backend != "fp8":
        pytest.importorskip({"hqq": "hqq", "quanto": "optimum.quanto"}[backend])
    ids, distances, sizes = prompt(40), [], []
    for model in (load(tiny()), uneven()):
        try:
            cache = QuantizedCache(config=model.config, **QUANTISED[backend])
        except ValueError as error:
            pytest.skip(f"this transformers has no such cache: {error}")
        found = steps(model, ids, cache)
        distances.append(((found - whole(model, ids)).norm() / whole(model, ids).norm()).item())
        exact = DynamicCache(config=model.config)
        steps(model, ids, exact)
        sizes.append(cache_bytes(cache) / cache_bytes(exact))
    assert distances[1] < 2 * distances[0] + 0.02
    assert sizes[1] < 1.1 * sizes[0] < 0.95


def test_fp8_holds_the_numbers_of_the_formula_in_a_byte_each(converted):
    """Half the numbers, each in half the bytes of bfloat16: the two savings multiply."""
    model = load(converted(rank=None, cache_ratio=0.5))
    try:
        cache = QuantizedCache(config=model.config, backend="fp8")
    except ValueError as error:
        pytest.skip(f"this transformers has no such cache: {error}")
    steps(model, prompt(40), cache)
    scales = 4 * 2 * 2 * len(cache.layers)
    assert 0 <= cache_bytes(cache) - 40 * formula_bytes(model.config, 1) <= scales


@pytest.mark.parametrize(
    "shapes",
    [[(64, 8), (176, 0)], [(64, 12), (144, 0)], [(64, 16), (64, 16)], [(1, 0), (0, 1)]],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_quantised_caches_as_they_come(backend, shapes):
    """Groups of 64, as the backends have them by default, fit whatever shapes a plan gives; one
    number is a width, too.
    """
    if backend != "fp8":
        pytest.importorskip({"hqq": "hqq", "quanto": "optimum.quanto"}[backend])
    spec = {
        side: {"base_width": [m] * 3, "rank": [r] * 3, "alignment": True}
        for side, (m, r) in zip(("keys", "values"), shapes)
    }
    model, ids = uneven(lrkv=spec), prompt(35)
    try:
        cache = QuantizedCache(
            config=model.config,
            **{**QUANTISED[backend], **({"q_group_size": 64} if backend != "fp8" else {})},
        )
    except ValueError as error:
        pytest.skip(f"this transformers has no such cache: {error}")
    expected = whole(model, ids)
    assert ((steps(model, ids, cache) - expected).norm() / expected.norm()).item() < (
        0.5 if backend == "quanto" else 0.1
    )


def test_beams_from_a_quantised_cache(tiny, converted):
    """With the residual window so long that nothing is rounded after the prompt, beams come out as
    from an exact cache of the rounded prompt.
    """
    pytest.importorskip("hqq")
    model, ids = load(converted()), prompt(12)
    config = {**QUANTISED["hqq"], "residual_length": 64}
    try:
        load(tiny()).generate(
            ids, cache_implementation="quantized", cache_config=config, num_beams=3, **GREEDY
        )
    except IndexError:
        pytest.skip("this transformers does not reorder quantised caches, the original's neither")
    beams = model.generate(
        ids, cache_implementation="quantized", cache_config=config, num_beams=3, **GREEDY
    )
    exact = model.generate(ids, num_beams=3, **GREEDY)
    assert (beams == exact).float().mean() > 0.9


# ---------------------------------------------------------------------------------------- offloaded


class Away(DynamicCache):
    """An offloading cache without a GPU: fetches and sends away in the order of transformers' own,
    but a layer that is away cannot be read.
    """

    def __init__(self, model):
        super().__init__(config=model.config)
        with_pairs(self, model.base_model.cache_pairs)
        self.offloading, self.away = True, {}
        for layer in self.layers:
            layer.prefetch = lambda layer=layer: self.__fetch(layer)

    def __fetch(self, layer):
        if id(layer) in self.away:
            layer.keys, layer.values = self.away.pop(id(layer))

    def get_seq_length(self, layer_idx=0):
        keys, _ = self.away.get(id(self.layers[layer_idx]), (None, None))
        # as transformers' own knows, on whatever device they are
        return super().get_seq_length(layer_idx) if keys is None else keys.shape[-2]

    def update(self, keys, values, layer_idx, *args, **kwargs):
        self.layers[(layer_idx + 1) % len(self.layers)].prefetch()
        layer = self.layers[layer_idx]
        assert id(layer) not in self.away, f"layer {layer_idx} is still away"
        found = layer.update(keys, values)
        self.away[id(layer)] = found
        layer.keys = layer.values = torch.empty(0, device="meta")
        return found


@pytest.mark.parametrize("layers", ["even", "uneven"])
def test_every_layer_is_back_when_it_is_read(layers, converted):
    model, ids = uneven() if layers == "uneven" else load(converted()), prompt(40)
    found = steps(model, ids, Away(model))
    assert relative(found, whole(model, ids)) < 1e-4


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="transformers' offloaded cache needs CUDA streams"
)
def test_the_offloaded_cache_of_transformers(converted):
    model, ids = load(converted()).cuda(), prompt(12).cuda()
    assert torch.equal(
        model.generate(ids, cache_implementation="offloaded", **GREEDY),
        model.generate(ids, **GREEDY),
    )


# ------------------------------------------------------------------------------------ crop, compile


def test_assisted_decoding_crops_the_cache(family, tiny, converted):
    """With a draft model, with n-gram lookup, and as the draft of its original: greedy output stays
    what it is.
    """
    model, original, ids = load(converted(family)), load(tiny(family)), prompt(12)
    assert torch.equal(
        model.generate(ids, assistant_model=original, **GREEDY), model.generate(ids, **GREEDY)
    )
    assert torch.equal(
        model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY), model.generate(ids, **GREEDY)
    )
    assert torch.equal(
        original.generate(ids, assistant_model=model, **GREEDY), original.generate(ids, **GREEDY)
    )


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_cropping_minds_no_layer_without_residuals(family):
    model, ids = uneven(family), prompt(12)
    assert torch.equal(
        model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY), model.generate(ids, **GREEDY)
    )


def test_a_static_cache_is_prefilled_in_chunks(converted):
    """transformers shapes the cache for whole keys and values beforehand then."""
    model, ids = load(converted()), prompt(40)
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(
        model.generate(
            ids,
            cache_implementation="static",
            prefill_chunk_size=16,
            disable_compile=True,
            **GREEDY,
        ),
        expected,
    )


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 4.0},
        {
            "rope_type": "longrope",
            "short_factor": [1.0] * 10,
            "long_factor": [3.0] * 10,
            "original_max_position_embeddings": 160,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_room_in_a_static_cache_is_no_text(rope):
    """RoPE variants that change with the length take that of the text, not that of the cache."""
    config = CONFIGS["llama"]().to_dict() | {
        "rope_parameters": {"rope_theta": 10000.0, **rope},
        "max_position_embeddings": 640 if "original_max_position_embeddings" in rope else 160,
    }
    config.pop("model_type")
    torch.manual_seed(0)
    spec = {
        "keys": {"base_width": [20, 20], "rank": [7, 7], "alignment": True},
        "values": {"base_width": [20, 20], "rank": [7, 7], "alignment": True},
    }
    model, ids = FAMILIES["llama"][2](FAMILIES["llama"][0](**config, lrkv=spec)).eval(), prompt(40)
    assert (
        relative(
            steps(model, ids, StaticCache(config=model.config, max_cache_len=400)),
            whole(model, ids),
        )
        < 1e-4
    )


@pytest.mark.slow
def test_a_static_cache_compiles_without_graph_breaks(family, tiny, converted):
    """`fullgraph` raises at a break; as many graphs as the original needs, and the logits of the
    uncached model.
    """
    counts = []
    for folder in (tiny(family), converted(family)):
        model, ids = load(folder), prompt(38)
        cache = StaticCache(config=model.config, max_cache_len=64)
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounter()
        step = torch.compile(model.forward, backend=counter, fullgraph=True)
        with torch.no_grad():
            model(ids[:, :30], past_key_values=cache)
            found = torch.cat(
                [
                    step(
                        ids[:, t : t + 1], past_key_values=cache, position_ids=torch.tensor([[t]])
                    ).logits
                    for t in range(30, 38)
                ],
                dim=1,
            )
        assert relative(found, whole(model, ids)) < 1e-4
        counts.append(counter.frame_count)
    assert counts[1] <= counts[0]


@pytest.mark.parametrize("path, requests", [("auto", 2), ("split", 1)])
def test_continuous_batching_generates_the_same_and_says_what_it_costs(
    path, requests, converted, caplog
):
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig
    from transformers.utils import logging

    model, ids = (
        load(converted(), lrkv_path=path),
        [prompt(12 + 8 * n, seed=n)[0].tolist() for n in range(requests)],
    )
    expected = [
        model.generate(torch.tensor([row]), **GREEDY)[0, len(row) :].tolist() for row in ids
    ]
    logging.enable_propagation()
    try:
        out = model.generate_batch(
            ids,
            generation_config=GenerationConfig(**{**GREEDY, "eos_token_id": -1}),
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64),
        )
    finally:
        logging.disable_propagation()
    assert sorted(o.generated_tokens for o in out.values()) == sorted(expected)
    assert path != "auto" or "whole keys and values" in caplog.text  # said once
