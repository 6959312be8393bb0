"""Special tokens in messages: the tokenizer that shares its parts against the one that is a copy."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from quire.text.chat import special
from quire.text.chat.special import SpecialText, SpecialTokenEscape
from tests.text.small_tokenizers import byte_level, fallback_bpe, fallback_unigram

ESCAPE = SpecialTokenEscape("\ue000")
PIECES = ["Hello", " ", "<", "|>", "é", "日", "</s>", "<unk>", "<think>", "\n"]


def with_tokens(make):
    """Tokens that the model does not hold, one special and one not, so that their numbers are others' in the shared."""
    backend = make()
    backend.add_tokens(
        [AddedToken("<think>", normalized=False), AddedToken("<|new|>", special=True, normalized=False, rstrip=True)]
    )
    return backend


@pytest.mark.parametrize("make", [byte_level, fallback_bpe, fallback_unigram])
@settings(max_examples=60, deadline=None)
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=9))
def test_sharing_gives_what_copying_gives(make, pieces):
    """It gives up where the model itself would spell a special token."""
    backend = with_tokens(make)
    both, copy = SpecialText(backend), SpecialText(backend)
    copy._renamed[special._beside] = copy._renamed_by(special._apart)
    names = sorted(both._names)
    text = "".join(piece + names[index % len(names)] for index, piece in enumerate(pieces))
    escaped = both._escaped_text(text, ESCAPE.mark)
    for rendered in (text, escaped, text + escaped):
        for adds in (False, True):
            found = both.encode(rendered, ESCAPE, add_special_tokens=adds)
            assert found == copy.encode(rendered, ESCAPE, add_special_tokens=adds)


def test_a_special_token_in_a_message_copies_no_vocabulary():
    """The copy takes half a second for 49,000 tokens and eight for 262,000, in which the process stands still."""
    text = SpecialText(with_tokens(byte_level))
    rendered = text._escaped_text("a <|new|> b", ESCAPE.mark) + "<|new|>"
    ids = text.encode(rendered, ESCAPE, add_special_tokens=True)
    assert [*text._renamed] == [special._beside]
    assert ids.count(text._names["<|new|>"]) == 1
