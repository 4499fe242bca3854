"""What a later release of transformers might change: each such release, acted out, is refused in
one line instead of giving wrong numbers.
"""

import importlib
import inspect

import pytest
import torch
import transformers
from conftest import prompt
from test_model import load
from transformers import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention
from typer.testing import CliRunner

from lrkv_cli.main import app
from lrkv_convert.modeling import ENCODER_DECODERS, FAMILIES, contract_lrkv
from lrkv_convert.modeling.contract_lrkv import CACHE, CACHE_NAMES, BrokenContract, take_cache


def attention_with(monkeypatch, model, change) -> None:
    """Every attention module of the model is called as `change(arguments)` would have it."""
    for module in model.modules():
        if hasattr(module, "keys") and hasattr(module, "values") and hasattr(module, "attend"):
            before = module.forward

            def forward(*args, before=before, **kwargs):
                change(kwargs)
                return before(*args, **kwargs)

            monkeypatch.setattr(module, "forward", forward)


def drop(names):
    return lambda arguments: [arguments.pop(name, None) for name in names]


def renamed(arguments: dict) -> None:
    arguments["kv_store"] = take_cache(arguments)


def one_line(error) -> str:
    said = str(error.value)
    assert (
        len(said.splitlines()) == 1
        and f"transformers {transformers.__version__} " in said
        and "5.17.0 to" in said
        and "Install" in said
    ), said
    return said


@pytest.mark.parametrize("change", [drop(CACHE_NAMES), renamed], ids=["dropped", "renamed"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "bloom"])
def test_a_cache_that_does_not_reach_attention(family, change, converted, monkeypatch):
    model = load(converted(family))
    attention_with(monkeypatch, model, change)
    with pytest.raises(BrokenContract) as error:
        model(prompt(), use_cache=True)
    assert "the cache" in one_line(error)
    with pytest.raises(BrokenContract):
        model.generate(prompt(12), max_new_tokens=2, do_sample=False, pad_token_id=258)
    model(prompt(), use_cache=False)  # nothing is wrong there


def test_a_cache_that_is_lost_after_the_prompt(converted, monkeypatch):
    model, cache = load(converted()), DynamicCache()
    model(prompt(), **{CACHE: cache})
    attention_with(monkeypatch, model, drop(CACHE_NAMES))
    with pytest.raises(BrokenContract):
        model(prompt(1), **{CACHE: cache})


def test_a_cache_that_reaches_some_layers_only(converted, monkeypatch):
    model = load(converted())
    before = model.model.layers[1].self_attn.forward
    monkeypatch.setattr(
        model.model.layers[1].self_attn,
        "forward",
        lambda *args, **kwargs: (take_cache(kwargs), before(*args, **kwargs))[1],
    )
    with pytest.raises(BrokenContract) as error:
        model(prompt(), use_cache=True)
    assert "layer 1 of the cache 0 tokens of 40" in one_line(error)


def test_a_cache_that_holds_fewer_tokens_than_it_was_given(converted, monkeypatch):
    model, cache = load(converted()), DynamicCache()
    before = model.model.layers[0].self_attn.forward

    def forward(*args, **kwargs):
        output = before(*args, **kwargs)
        cache.layers[0].crop(-1)
        return output

    monkeypatch.setattr(model.model.layers[0].self_attn, "forward", forward)
    with pytest.raises(BrokenContract) as error:
        model(prompt(), **{CACHE: cache})
    assert "39 tokens of 40" in one_line(error)


def test_while_compiling_too(converted, monkeypatch):
    """Seen when the step is traced; nothing is left of the check in the graph."""
    model = load(converted())
    cache = StaticCache(config=model.config, max_cache_len=64)
    model(prompt(), **{CACHE: cache})
    attention_with(monkeypatch, model, drop(CACHE_NAMES))
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(Exception, match="did not hand the cache on"):
        torch.compile(model.forward, backend="eager", fullgraph=True)(
            prompt(1), **{CACHE: cache}, position_ids=torch.tensor([[40]])
        )


def test_caches_of_encoder_decoders_that_do_not_reach_attention(tmp_path, monkeypatch):
    from encoder_decoders import build

    from lrkv_convert import convert

    convert(str(build("bart", tmp_path / "source")), tmp_path / "out", rank=7, calibration=[])
    model = load_seq2seq(tmp_path / "out")
    model(prompt(9), decoder_input_ids=prompt(7), use_cache=True)
    attention_with(monkeypatch, model, drop(CACHE_NAMES))
    with pytest.raises(BrokenContract) as error:
        model(prompt(9), decoder_input_ids=prompt(7), use_cache=True)
    one_line(error)


def load_seq2seq(folder):
    return transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()


def test_layers_dropped_in_training_are_no_breach(tmp_path):
    from encoder_decoders import CONFIGS

    config = CONFIGS["bart"]()
    config.decoder_layerdrop = 0.9
    spec = {
        side: {"base_width": [20, 20], "rank": [7, 7], "alignment": True}
        for side in ("keys", "values")
    }
    config_class, _, model_class = ENCODER_DECODERS["bart"]
    model = model_class(
        config_class(
            **{**config.to_dict(), "lrkv": spec, "lrkv_cross": spec, "model_type": "lrkv_bart"}
        )
    ).train()
    for seed in range(4):
        torch.manual_seed(seed)
        model(prompt(9), decoder_input_ids=prompt(7), use_cache=True)


# ---------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize(
    "change, says",
    [
        (drop(["position_embeddings"]), "no position embeddings"),
        (
            lambda a: a.update(
                position_embeddings=tuple(t[..., :10] for t in a["position_embeddings"])
            ),
            "another layout",
        ),
        (
            lambda a: a.update(
                position_embeddings=tuple(
                    t[..., :10].repeat_interleave(2, -1) for t in a["position_embeddings"]
                )
            ),
            "another layout",
        ),
        (
            lambda a: a.update(
                position_embeddings=tuple(t[:, :-1] for t in a["position_embeddings"])
            ),
            "another layout",
        ),
        (lambda a: a.update(position_embeddings=a["position_embeddings"][0]), "no pair"),
        (
            lambda a: a.update(position_embeddings=torch.complex(*a["position_embeddings"])),
            "no pair",
        ),
    ],
    ids=["none", "halves", "neighbours", "shorter", "one", "complex"],
)
@pytest.mark.parametrize("use_cache", [True, False])
def test_positions_of_another_kind(change, says, use_cache, converted, monkeypatch):
    model = load(converted())
    attention_with(monkeypatch, model, change)
    with pytest.raises(BrokenContract) as error:
        model(prompt(), use_cache=use_cache)
    assert says in one_line(error)


# -------------------------------------------------------------------------------------------- masks


def padded() -> dict:
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :9] = 0
    return dict(input_ids=prompt(batch=2), attention_mask=mask)


@pytest.mark.parametrize(
    "attention, given",
    [("sdpa", padded), ("eager", lambda: dict(input_ids=prompt()))],
    ids=["padding", "eager"],
)
def test_a_mask_that_does_not_reach_attention(attention, given, converted, monkeypatch):
    model = load(converted(), attn_implementation=attention)
    attention_with(monkeypatch, model, drop(["attention_mask"]))
    with pytest.raises(BrokenContract) as error:
        model(**given(), use_cache=True)
    assert "no mask" in one_line(error)


@pytest.mark.parametrize(
    "change",
    [
        lambda mask: {"full_attention": mask},
        lambda mask: mask.mT[:, :, :5],
        lambda mask: mask[..., :-1],
        lambda mask: mask[:, 0],
        lambda mask: mask.long(),
        lambda mask: mask.repeat(3, 1, 1, 1),
    ],
    ids=["dict", "rows", "columns", "three dimensions", "integers", "batch"],
)
def test_a_mask_of_another_shape(change, converted, monkeypatch):
    model = load(converted())
    attention_with(
        monkeypatch, model, lambda a: a.update(attention_mask=change(a["attention_mask"]))
    )
    with pytest.raises(BrokenContract) as error:
        model(**padded(), use_cache=True)
    one_line(error)


# -------------------------------------------------------- attention functions, signatures, versions


def test_an_attention_function_that_answers_in_another_order(converted, monkeypatch):
    folder, before = converted(), ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS._global_mapping,
        "sdpa",
        lambda *args, **kwargs: (before(*args, **kwargs)[0].transpose(1, 2), None),
    )
    with pytest.raises(BrokenContract) as error:
        load(folder)(prompt())
    assert "gives" in one_line(error)


def test_an_attention_function_that_knows_no_scaling(converted, monkeypatch):
    folder = converted()

    def sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=0.0, scale=None, **kwargs
    ):
        raise AssertionError("must not be reached")

    sdpa_attention_forward.__module__ = "transformers.integrations.sdpa_attention"
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", sdpa_attention_forward)
    with pytest.raises(BrokenContract) as error:
        load(folder)(prompt())
    assert "scale" in one_line(error)


def test_an_attention_function_of_the_users_own_may_take_what_it_likes(converted):
    transformers.AttentionInterface.register("mine", ALL_ATTENTION_FUNCTIONS["sdpa"])
    transformers.AttentionMaskInterface.register("mine", transformers.masking_utils.sdpa_mask)
    ids = prompt()
    mine, sdpa = (
        load(converted(), attn_implementation=name)(ids).logits for name in ("mine", "sdpa")
    )
    assert torch.equal(mine, sdpa)


@pytest.mark.parametrize(
    "gone",
    [["attention_mask"], ["position_embeddings", "position_ids"], list(CACHE_NAMES)],
    ids=str,
)
def test_attention_that_takes_other_arguments_is_refused_when_the_model_is_built(
    gone, converted, monkeypatch
):
    # converted before anything is acted out
    folder, known = converted(), inspect.signature(LlamaAttention.forward)

    def forward(self, *args, **kwargs):
        raise AssertionError("must not be reached")

    forward.__signature__ = known.replace(
        parameters=[
            p.replace(name=f"new_{p.name}") if p.name in gone else p
            for p in known.parameters.values()
        ]
    )
    monkeypatch.setattr(LlamaAttention, "forward", forward)
    with pytest.raises(BrokenContract) as error:
        load(folder)
    one_line(error)


def test_a_newer_release_is_named_once(monkeypatch, caplog):
    from transformers.utils import logging

    logging.enable_propagation()
    try:
        for version, expected in ((contract_lrkv.TESTED[1], 0), ("5.99.1", 1)):
            monkeypatch.setattr(transformers, "__version__", version)
            contract_lrkv.say_if_newer()
            contract_lrkv.say_if_newer()
            said = [
                record.message
                for record in caplog.records
                if "LRKV modelling files" in record.message
            ]
            assert len(said) == expected
        assert contract_lrkv.TESTED[1] in said[0] and "5.99.1" in said[0]
    finally:
        logging.disable_propagation()


def test_the_command_line_says_both_in_a_line(tiny, converted, monkeypatch):
    """transformers' own warnings are silenced there."""
    source, folder = tiny(), converted()
    monkeypatch.setattr(transformers, "__version__", "5.99.1")
    result = CliRunner().invoke(app, ["convert", str(source), "--out", "never", "--rank", "99"])
    assert [line[:6] for line in result.stderr.splitlines()] == [
        "note: ",
        "error:",
    ] and "5.99.1" in result.stderr
    monkeypatch.setattr(transformers, "__version__", contract_lrkv.TESTED[1])
    monkeypatch.setattr(
        contract_lrkv.Written,
        "check",
        lambda self: (_ for _ in ()).throw(BrokenContract("did not hand the cache on")),
    )
    result = CliRunner().invoke(app, ["bench", str(folder), "--tokens", "64"])
    assert (
        result.exit_code == 1
        and len(result.stderr.splitlines()) == 1
        and "did not hand the cache on" in result.stderr
    )


def test_every_family_says_what_it_is_handed():
    """The table in contract_lrkv.py is what `require_arguments` asks of every family under this
    release.
    """
    for _, base_class, _ in FAMILIES.values():
        module = importlib.import_module(base_class.__module__)
        [attention] = [
            cls
            for name, cls in vars(module).items()
            if name.startswith("Lrkv")
            and name.endswith("Attention")
            and cls.__module__ == module.__name__
        ]
        contract_lrkv.require_arguments(attention, hasattr(base_class, "rotation"))


def test_two_caches_are_one_too_many(converted):
    with pytest.raises(ValueError, match="two different caches"):
        load(converted()).model(prompt(), cache=DynamicCache(), past_key_values=DynamicCache())


def test_arguments_by_position_are_the_familys(converted):
    model, given = load(converted()), padded()
    assert torch.equal(
        model.model(given["input_ids"], given["attention_mask"])[0], model.model(**given)[0]
    )
