"""Model classes of converted checkpoints, one file per family; the files travel with every output.

Importing this package registers them with transformers, so that converted folders load without
`trust_remote_code`.
"""

import sys

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
)

from .modeling_lrkv_bart import LrkvBartConfig, LrkvBartForConditionalGeneration, LrkvBartModel
from .modeling_lrkv_bloom import LrkvBloomConfig, LrkvBloomForCausalLM, LrkvBloomModel
from .modeling_lrkv_codegen import LrkvCodeGenConfig, LrkvCodeGenForCausalLM, LrkvCodeGenModel
from .modeling_lrkv_cohere import LrkvCohereConfig, LrkvCohereForCausalLM, LrkvCohereModel
from .modeling_lrkv_falcon import LrkvFalconConfig, LrkvFalconForCausalLM, LrkvFalconModel
from .modeling_lrkv_gemma import LrkvGemmaConfig, LrkvGemmaForCausalLM, LrkvGemmaModel
from .modeling_lrkv_gemma2 import LrkvGemma2Config, LrkvGemma2ForCausalLM, LrkvGemma2Model
from .modeling_lrkv_gemma3_text import (
    LrkvGemma3TextConfig,
    LrkvGemma3TextForCausalLM,
    LrkvGemma3TextModel,
)
from .modeling_lrkv_gpt2 import LrkvGPT2Config, LrkvGPT2LMHeadModel, LrkvGPT2Model
from .modeling_lrkv_gpt_neo import LrkvGPTNeoConfig, LrkvGPTNeoForCausalLM, LrkvGPTNeoModel
from .modeling_lrkv_gpt_neox import LrkvGPTNeoXConfig, LrkvGPTNeoXForCausalLM, LrkvGPTNeoXModel
from .modeling_lrkv_gptj import LrkvGPTJConfig, LrkvGPTJForCausalLM, LrkvGPTJModel
from .modeling_lrkv_llama import LrkvLlamaConfig, LrkvLlamaForCausalLM, LrkvLlamaModel
from .modeling_lrkv_marian import LrkvMarianConfig, LrkvMarianModel, LrkvMarianMTModel
from .modeling_lrkv_mistral import LrkvMistralConfig, LrkvMistralForCausalLM, LrkvMistralModel
from .modeling_lrkv_mixtral import LrkvMixtralConfig, LrkvMixtralForCausalLM, LrkvMixtralModel
from .modeling_lrkv_mpt import LrkvMptConfig, LrkvMptForCausalLM, LrkvMptModel
from .modeling_lrkv_olmo import LrkvOlmoConfig, LrkvOlmoForCausalLM, LrkvOlmoModel
from .modeling_lrkv_olmo2 import LrkvOlmo2Config, LrkvOlmo2ForCausalLM, LrkvOlmo2Model
from .modeling_lrkv_opt import LrkvOPTConfig, LrkvOPTForCausalLM, LrkvOPTModel
from .modeling_lrkv_pegasus import (
    LrkvPegasusConfig,
    LrkvPegasusForConditionalGeneration,
    LrkvPegasusModel,
)
from .modeling_lrkv_phi import LrkvPhiConfig, LrkvPhiForCausalLM, LrkvPhiModel
from .modeling_lrkv_phi3 import LrkvPhi3Config, LrkvPhi3ForCausalLM, LrkvPhi3Model
from .modeling_lrkv_qwen2 import LrkvQwen2Config, LrkvQwen2ForCausalLM, LrkvQwen2Model
from .modeling_lrkv_qwen2_moe import LrkvQwen2MoeConfig, LrkvQwen2MoeForCausalLM, LrkvQwen2MoeModel
from .modeling_lrkv_qwen3 import LrkvQwen3Config, LrkvQwen3ForCausalLM, LrkvQwen3Model
from .modeling_lrkv_qwen3_moe import LrkvQwen3MoeConfig, LrkvQwen3MoeForCausalLM, LrkvQwen3MoeModel
from .modeling_lrkv_stablelm import LrkvStableLmConfig, LrkvStableLmForCausalLM, LrkvStableLmModel
from .modeling_lrkv_t5 import LrkvT5Config, LrkvT5ForConditionalGeneration, LrkvT5Model
from .modeling_lrkv_whisper import (
    LrkvWhisperConfig,
    LrkvWhisperForConditionalGeneration,
    LrkvWhisperModel,
)

# original model_type -> (config, base model, causal LM)
FAMILIES: dict[str, tuple[type, type, type]] = {
    "bloom": (LrkvBloomConfig, LrkvBloomModel, LrkvBloomForCausalLM),
    "codegen": (LrkvCodeGenConfig, LrkvCodeGenModel, LrkvCodeGenForCausalLM),
    "cohere": (LrkvCohereConfig, LrkvCohereModel, LrkvCohereForCausalLM),
    "falcon": (LrkvFalconConfig, LrkvFalconModel, LrkvFalconForCausalLM),
    "gemma": (LrkvGemmaConfig, LrkvGemmaModel, LrkvGemmaForCausalLM),
    "gemma2": (LrkvGemma2Config, LrkvGemma2Model, LrkvGemma2ForCausalLM),
    "gemma3_text": (LrkvGemma3TextConfig, LrkvGemma3TextModel, LrkvGemma3TextForCausalLM),
    "gpt2": (LrkvGPT2Config, LrkvGPT2Model, LrkvGPT2LMHeadModel),
    "gpt_neo": (LrkvGPTNeoConfig, LrkvGPTNeoModel, LrkvGPTNeoForCausalLM),
    "gpt_neox": (LrkvGPTNeoXConfig, LrkvGPTNeoXModel, LrkvGPTNeoXForCausalLM),
    "gptj": (LrkvGPTJConfig, LrkvGPTJModel, LrkvGPTJForCausalLM),
    "llama": (LrkvLlamaConfig, LrkvLlamaModel, LrkvLlamaForCausalLM),
    "mistral": (LrkvMistralConfig, LrkvMistralModel, LrkvMistralForCausalLM),
    "mixtral": (LrkvMixtralConfig, LrkvMixtralModel, LrkvMixtralForCausalLM),
    "mpt": (LrkvMptConfig, LrkvMptModel, LrkvMptForCausalLM),
    "olmo": (LrkvOlmoConfig, LrkvOlmoModel, LrkvOlmoForCausalLM),
    "olmo2": (LrkvOlmo2Config, LrkvOlmo2Model, LrkvOlmo2ForCausalLM),
    "opt": (LrkvOPTConfig, LrkvOPTModel, LrkvOPTForCausalLM),
    "phi": (LrkvPhiConfig, LrkvPhiModel, LrkvPhiForCausalLM),
    "phi3": (LrkvPhi3Config, LrkvPhi3Model, LrkvPhi3ForCausalLM),
    "qwen2": (LrkvQwen2Config, LrkvQwen2Model, LrkvQwen2ForCausalLM),
    "qwen2_moe": (LrkvQwen2MoeConfig, LrkvQwen2MoeModel, LrkvQwen2MoeForCausalLM),
    "qwen3": (LrkvQwen3Config, LrkvQwen3Model, LrkvQwen3ForCausalLM),
    "qwen3_moe": (LrkvQwen3MoeConfig, LrkvQwen3MoeModel, LrkvQwen3MoeForCausalLM),
    "stablelm": (LrkvStableLmConfig, LrkvStableLmModel, LrkvStableLmForCausalLM),
}

# the same of encoder-decoders: original model_type -> (config, base model, model with its language
# head)
ENCODER_DECODERS: dict[str, tuple[type, type, type]] = {
    "bart": (LrkvBartConfig, LrkvBartModel, LrkvBartForConditionalGeneration),
    "marian": (LrkvMarianConfig, LrkvMarianModel, LrkvMarianMTModel),
    "pegasus": (LrkvPegasusConfig, LrkvPegasusModel, LrkvPegasusForConditionalGeneration),
    "t5": (LrkvT5Config, LrkvT5Model, LrkvT5ForConditionalGeneration),
    "whisper": (LrkvWhisperConfig, LrkvWhisperModel, LrkvWhisperForConditionalGeneration),
}
CLASSES = FAMILIES | ENCODER_DECODERS


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
