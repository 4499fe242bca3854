"""Model classes of converted checkpoints, one file per family; the files travel with every output.

Importing this package registers them with transformers, so that converted folders load without
`trust_remote_code`.
"""

import importlib
import pkgutil
import sys

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    GenerationMixin,
    PreTrainedConfig,
)

from .attention_lrkv import LrkvAttention

OWN = "modeling_lrkv_"  # before the family in the name of its file
Classes = tuple[type, type, type]  # config, base model, model with its language head


def classes_of(model_type: str) -> Classes:
    """The classes in a family's own file: its config, the model of the same name, and the one that
    generates.
    """
    module = importlib.import_module(f".{OWN}{model_type}", __name__)
    every = [value for value in vars(module).values() if isinstance(value, type)]
    own = [cls for cls in every if cls.__module__ == module.__name__]
    [config] = [cls for cls in own if issubclass(cls, PreTrainedConfig)]
    [head] = [cls for cls in own if issubclass(cls, GenerationMixin)]
    return config, getattr(module, config.__name__.removesuffix("Config") + "Model"), head


# original model_type -> its classes: a file is a family
CLASSES: dict[str, Classes] = {
    name.removeprefix(OWN): classes_of(name.removeprefix(OWN))
    for _, name, _ in pkgutil.iter_modules(__path__)
    if name.startswith(OWN)
}
ENCODER_DECODERS = {
    name: classes for name, classes in CLASSES.items() if classes[0]().is_encoder_decoder
}
FAMILIES = {name: classes for name, classes in CLASSES.items() if name not in ENCODER_DECODERS}


def attention_class(model_type: str) -> type[LrkvAttention]:
    """The attention of a family's decoder: what it says of itself is what runs."""
    module = importlib.import_module(f".{OWN}{model_type}", __name__)
    every = [value for value in vars(module).values() if isinstance(value, type)]
    [found] = [
        cls for cls in every if cls.__module__ == module.__name__ and issubclass(cls, LrkvAttention)
    ]
    return found


def auto_class(model_type: str) -> type:
    """The auto class that loads such a model with its head."""
    return (
        AutoModelForCausalLM
        if model_type in FAMILIES
        else AutoModelForSpeechSeq2Seq
        if model_type == "whisper"
        else AutoModelForSeq2SeqLM
    )


for family, (config_class, base_class, head_class) in CLASSES.items():
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, base_class, exist_ok=True)
    auto_class(family).register(config_class, head_class, exist_ok=True)
    # so that `save_pretrained` of a loaded model takes the modelling files along
    config_class.register_for_auto_class("AutoConfig")
    base_class.register_for_auto_class("AutoModel")
    head_class.register_for_auto_class(auto_class(family).__name__)


def auto_map(model_type: str) -> dict[str, str]:
    """The `auto_map` entry of config.json: where transformers finds the classes inside the
    folder.
    """
    names = ("AutoConfig", "AutoModel", auto_class(model_type).__name__)
    return {
        name: f"{cls.__module__.rsplit('.', 1)[1]}.{cls.__name__}"
        for name, cls in zip(names, CLASSES[model_type])
    }


def name_in_transformers() -> None:
    """Make the classes attributes of the transformers module, where its server looks up what
    config.json names under `architectures`.
    """
    for _, _, head_class in CLASSES.values():
        # `import transformers` may give the module its lazy one has replaced
        setattr(sys.modules["transformers"], head_class.__name__, head_class)
