"""A tiny random model whose template knows tools in the manner of Hermes, and reasoning in that of Qwen 3."""

# ruff: noqa: E501 - text of templates

from pathlib import Path

from tests.tiny.checkpoints import make_tiny

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
    """A checkpoint of 4,096 positions; one token is one byte."""
    made = make_tiny("llama", directory, dtype="bfloat16", tokenizer=True, max_position_embeddings=4096)
    (made / "chat_template.jinja").write_text(template, encoding="utf-8")
    return made
