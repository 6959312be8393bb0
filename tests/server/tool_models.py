"""A tiny random model whose template knows tools in the manner of Hermes, and reasoning in that of Qwen 3."""

# ruff: noqa: E501 - text of templates

from pathlib import Path

from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer

from tests.tiny.checkpoints import make_tiny

START_OF_ANSWER = 259
"""The token that ends a prompt."""
OPENS_CALL = 260
HERMES = (
    "{%- if tools %}{{- '<|system|># Tools\n\nYou may call one or more functions, given within <tools></tools>:\n<tools>' }}"
    "{%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}{{- '\n</tools>\n\nFor each call, return a json "
    'object within <tool_call></tool_call>:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.role == 'tool' %}{{- '<|user|><tool_response>\n' + message.content + "
    "'\n</tool_response>' }}{%- else %}{{- '<|' + message.role + '|>' }}"
    "{%- if message.content %}{{- message.content }}{%- endif %}"
    '{%- for call in message.tool_calls or [] %}{{- \'\n<tool_call>\n{"name": "\' + call.function.name + '
    "'\", \"arguments\": ' + call.function.arguments | tojson + '}\n</tool_call>' }}{%- endfor %}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)
THINKING = HERMES.replace(
    "{{- '<|assistant|>' }}",
    "{{- '<|assistant|>' }}{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}",
).replace(
    "{%- if message.content %}",
    "{%- if message.reasoning_content %}{{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}{%- endif %}"
    "{%- if message.content %}",
)


def make_tool_model(directory: Path, template: str = HERMES) -> Path:
    """A checkpoint of 4,096 positions. A token is a byte; what opens and closes calls are tokens too, as in Qwen 3."""
    made = make_tiny("llama", directory, dtype="bfloat16", tokenizer=True, max_position_embeddings=4096)
    (made / "chat_template.jinja").write_text(template, encoding="utf-8")
    tokenizer = Tokenizer.from_file(str(made / "tokenizer.json"))
    tokenizer.add_tokens(
        [AddedToken(text, special=False, normalized=False) for text in ("<tool_call>", "</tool_call>")]
    )
    assert tokenizer.token_to_id("<tool_call>") == OPENS_CALL
    tokenizer.save(str(made / "tokenizer.json"))
    return made


def make_caller(directory: Path, template: str = HERMES) -> Path:
    """A model that likes to open calls, at the beginning of an answer and after letters; everything else is as likely
    as anything."""
    made = make_tool_model(directory, template)
    path = made / "model.safetensors"
    weights = load_file(path)
    for name, weight in weights.items():
        weight.fill_(1.0) if "norm" in name else weight.zero_()
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    embedding[START_OF_ANSWER, 0] = 1.0  # a norm makes 8 of it
    embedding[ord("a") : ord("z") + 1, 1] = 1.0
    head[OPENS_CALL, 0], head[OPENS_CALL, 1] = 5.4 / 8, 4.0 / 8
    save_file(weights, path, metadata={"format": "pt"})
    return made
