"""The embedded demo model: a tiny Llama checkpoint that talks about LLM inference.

`MODEL_CARD.md` beside this file says what it is and how it was made.
"""

from pathlib import Path


def model_path() -> str:
    """Return the directory of the demo checkpoint, in Hugging Face format."""
    return str(Path(__file__).parent / "model")
