"""Model classes of converted checkpoints, one file per family; the files travel with every output.

Importing this package registers them with transformers, so that converted folders load without `trust_remote_code`.
"""
import sys

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .modeling_lrkv_gpt2 import LrkvGPT2Config, LrkvGPT2LMHeadModel, LrkvGPT2Model
from .modeling_lrkv_llama import LrkvLlamaConfig, LrkvLlamaForCausalLM, LrkvLlamaModel
from .modeling_lrkv_mistral import LrkvMistralConfig, LrkvMistralForCausalLM, LrkvMistralModel
from .modeling_lrkv_qwen2 import LrkvQwen2Config, LrkvQwen2ForCausalLM, LrkvQwen2Model

# original model_type -> (config, base model, causal LM)
FAMILIES: dict[str, tuple[type, type, type]] = {
    "gpt2": (LrkvGPT2Config, LrkvGPT2Model, LrkvGPT2LMHeadModel),
    "llama": (LrkvLlamaConfig, LrkvLlamaModel, LrkvLlamaForCausalLM),
    "mistral": (LrkvMistralConfig, LrkvMistralModel, LrkvMistralForCausalLM),
    "qwen2": (LrkvQwen2Config, LrkvQwen2Model, LrkvQwen2ForCausalLM),
}

for config_class, base_class, causal_class in FAMILIES.values():
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, base_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, causal_class, exist_ok=True)
    # so that `save_pretrained` of a loaded model takes the modelling files along
    config_class.register_for_auto_class("AutoConfig")
    base_class.register_for_auto_class("AutoModel")
    causal_class.register_for_auto_class("AutoModelForCausalLM")


def auto_map(model_type: str) -> dict[str, str]:
    """The `auto_map` entry of config.json: where transformers finds the classes inside the folder."""
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    return {name: f"{cls.__module__.rsplit('.', 1)[1]}.{cls.__name__}" for name, cls in zip(names, FAMILIES[model_type])}


def name_in_transformers() -> None:
    """Make the classes attributes of the transformers module, where its server looks up what config.json names under `architectures`."""
    for _, _, causal in FAMILIES.values():
        setattr(sys.modules["transformers"], causal.__name__, causal)       # `import transformers` may give the module its lazy one has replaced
