"""From the architecture that a config names to its family."""

from collections.abc import Callable, Mapping
from typing import Any

from quire.errors import ModelFileError, UnsupportedModelError
from quire.models.families.gemma2 import gemma2
from quire.models.families.gemma3 import gemma3, gemma3_text_of
from quire.models.families.gpt2 import gpt2
from quire.models.families.granite import granite
from quire.models.families.llama import llama
from quire.models.families.mistral import mistral
from quire.models.families.olmo2 import olmo2
from quire.models.families.phi3 import phi3
from quire.models.families.qwen2 import qwen2
from quire.models.families.qwen3 import qwen3
from quire.models.families.smollm3 import smollm3
from quire.models.families.starcoder2 import starcoder2
from quire.models.hf_config import ConfigReader
from quire.models.parameters import NameMap
from quire.models.spec import DecoderSpec

Family = Callable[[ConfigReader], tuple[DecoderSpec, NameMap]]

FAMILIES: Mapping[str, Family] = {
    "Gemma2ForCausalLM": gemma2,
    "Gemma3ForCausalLM": gemma3,
    "Gemma3ForConditionalGeneration": gemma3_text_of,
    "GPT2LMHeadModel": gpt2,
    "GraniteForCausalLM": granite,
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": mistral,
    "Olmo2ForCausalLM": olmo2,
    "Phi3ForCausalLM": phi3,
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
    "SmolLM3ForCausalLM": smollm3,
    "Starcoder2ForCausalLM": starcoder2,
}


def load_spec(config: Mapping[str, Any]) -> tuple[DecoderSpec, NameMap]:
    """The spec of the model that `config` (a parsed `config.json`) describes, and the names of its tensors.

    Raises:
        UnsupportedModelError: an architecture or a setting that Quire does not have, named.
        ModelFileError: a value that is missing, of a wrong type or out of range, named.
    """
    reader = ConfigReader(config)
    spec, names = _family(config)(reader)
    reader.refuse_unread()
    return spec, names


def _family(config: Mapping[str, Any]) -> Family:
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise ModelFileError("config.json names no architecture")
    name = architectures[0][:100]
    if name not in FAMILIES:
        # A name that is merely near is another architecture's, whose weights would not fit.
        nearest = [f"; did you mean {known!r}?" for known in FAMILIES if known.lower() == name.lower()]
        supported = ", ".join(FAMILIES)
        raise UnsupportedModelError(
            f"the architecture {name!r} is not supported{''.join(nearest)}; these are: {supported}"
        )
    return FAMILIES[name]
