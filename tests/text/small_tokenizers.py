"""Tiny tokenizers of the kinds that language models have, written as a model's directory."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The scheduler gives each request a number of tokens and the cache gives it blocks.",
    "system user assistant: hello world, how are you? I'm fine; thank you!",
    "Paged attention keeps keys and values in blocks. 分頁注意力把鍵和值放在區塊裡。你好，世界！",
    'def add(a, b):\n    return a + b\n\n{"name": "add", "arguments": {"a": 1, "b": 2}}',
    "naïve café — Ελληνικά, русский, 日本語, 한국어, नमस्ते 👍🏽 👨‍👩‍👧‍👦",
] * 4

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
    "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

HEADERS = (  # in the manner of Llama 3
    "{{- bos_token }}\n"
    "{%- if tools is not none and tools %}\n"
    "    {{- '<|start_header_id|>system<|end_header_id|>\\n\\nTools:\\n' }}\n"
    "    {%- for tool in tools %}{{ tool | tojson(indent=4) }}{{ '\\n' }}{% endfor %}{{- '<|eot_id|>' }}\n"
    "{%- endif %}\n"
    "{%- for message in messages %}\n"
    "    {%- if message.tool_calls is defined %}\n"
    "        {%- set call = message.tool_calls[0].function %}\n"
    "        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n"
    "        {{- '{\"name\": \"' + call.name + '\", \"parameters\": ' + call.arguments | tojson + '}<|eot_id|>' }}\n"
    "    {%- else %}\n"
    "        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim "
    "+ '<|eot_id|>' }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n"
    "{%- endif %}\n"
)

INSTRUCTIONS = (  # in the manner of Mistral
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' ~ (system + '\n\n' if system is defined and loop.first else '') "
    "~ message['content'] ~ ' [/INST]' }}{% else %}{{ ' ' + message['content'].strip() + eos_token }}{% endif %}"
    "{% endfor %}"
)

TURNS = (  # in the manner of Gemma: content may be a list of parts
    "{{ bos_token }}{% for message in messages %}{% set role = 'model' if message.role == 'assistant' else "
    "message.role %}{{ '<start_of_turn>' ~ role ~ '\n' }}{% generation %}{% if message.content is string %}"
    "{{ message.content | trim }}{% else %}{% for part in message.content %}{% if part.type == 'text' %}"
    "{{ part.text | trim }}{% endif %}{% endfor %}{% endif %}{% endgeneration %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

SPECIAL = [
    "<s>",
    "</s>",
    "<unk>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "[INST]",
    "[/INST]",
    "<start_of_turn>",
    "<end_of_turn>",
]


def byte_level() -> Tokenizer:
    """Byte-level BPE with all special tokens, and `<think>` as an added token that is not special."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("<think>", special=False), AddedToken("你好吗", special=False)])
    return backend


def _fallback_vocabulary() -> list[str]:
    words = sorted({word for line in CORPUS[:2] for word in line.split()})
    pieces = sorted({character for line in CORPUS[:2] for character in line.replace(" ", "▁")} | {"▁"})
    return ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *(f"▁{w}" for w in words)]


def _sentencepiece(backend: Tokenizer) -> Tokenizer:
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return backend


def fallback_bpe() -> Tokenizer:
    """BPE over SentencePiece pieces with byte fallback and a prepended space, as Llama 2 has it."""
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(_fallback_vocabulary()))}
    merges = []
    for word in [piece for piece in vocabulary if piece.startswith("▁") and len(piece) > 1]:
        for end in range(2, len(word) + 1):
            left, right = word[: end - 1], word[end - 1]
            vocabulary.setdefault(left + right, len(vocabulary))
            if (left, right) not in merges and right in vocabulary:
                merges.append((left, right))
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _sentencepiece(backend)


def fallback_unigram() -> Tokenizer:
    """Unigram with a Metaspace that prepends to the first piece alone; `</s>` is an ordinary piece too."""
    pieces = list(dict.fromkeys(_fallback_vocabulary()))
    scores = [(piece, 0.0 if number < 3 else -20.0 + len(piece)) for number, piece in enumerate(pieces)]
    backend = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    return _sentencepiece(backend)


def no_decoder() -> Tokenizer:
    """Whole words and no decoder at all: tokens are joined by spaces."""
    words = ["<unk>", "hello", "world", "a"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


KINDS = {
    "byte_level": byte_level,
    "fallback_bpe": fallback_bpe,
    "fallback_unigram": fallback_unigram,
    "no_decoder": no_decoder,
}


def write_directory(
    directory: Path, backend: Tokenizer, *, chat_template: Any = None, files: dict[str, Any] | None = None
) -> Path:
    """A model's directory with this tokenizer; `files` adds JSON files or replaces the standard ones."""
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    config: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    if chat_template is not None:
        config["chat_template"] = chat_template
    for name, value in ({"tokenizer_config.json": config} | (files or {})).items():
        (directory / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return directory
