"""Incremental detokenisation is decoding; stop strings do not depend on how the text was cut."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.errors import InvalidRequestError
from quire.text.detokenizer import IncrementalDetokenizer, StopSearch, StopStrings
from quire.text.tokenizer import Tokenizer
from tests.text.small_tokenizers import KINDS, write_directory

TEXTS = st.one_of(
    st.text(max_size=30),
    st.text("👍🏽👨‍👩‍👧‍👦🇹🇼e\u0301\u0302你好分頁한글 ab", max_size=30),
    st.sampled_from(["  leading", "hello world", "<|im_end|> <s></s>x", "\u200d\ufffd"]),
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: Tokenizer.from_directory(write_directory(root / kind, build())) for kind, build in KINDS.items()}


def in_pieces(data, values):
    """The values, cut at drawn places."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(values)), max_size=8)))
    return [values[start:end] for start, end in zip([0, *cuts], [*cuts, len(values)], strict=True)]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data(), skip=st.booleans(), spaces=st.booleans())
def test_pushes_and_flush_are_the_decoded_whole(tokenizers, kind, data, skip, spaces):
    tokenizer = tokenizers[kind]
    if data.draw(st.booleans()):
        ids = tokenizer.encode(data.draw(TEXTS))
    else:
        ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40))
    switches = {"skip_special_tokens": skip, "spaces_between_special_tokens": spaces}
    detokenizer = IncrementalDetokenizer(tokenizer, **switches)
    pushed = "".join(detokenizer.push(piece) for piece in in_pieces(data, ids))
    assert pushed + detokenizer.flush() == tokenizer.decode(ids, **switches)


@pytest.mark.parametrize("kind", ["byte_level", "fallback_bpe", "fallback_unigram"])
@settings(max_examples=200, deadline=None)
@given(text=st.text("👍🏽👨‍👩‍👧‍👦🇹🇼e\u0301你好分頁한글 ab", max_size=30))
def test_no_character_is_split(tokenizers, kind, text):
    """One token at a time: every piece is whole characters of the text, in order, as soon as they are complete."""
    tokenizer = tokenizers[kind]
    detokenizer = IncrementalDetokenizer(tokenizer)
    ids = tokenizer.encode(text)
    given_out = ""
    for place, token_id in enumerate(ids):
        given_out += detokenizer.push([token_id])
        known = b"".join(
            map(tokenizer.token_bytes, [n for n in ids[: place + 1] if n not in tokenizer.special_token_ids])
        )
        complete = known.decode("utf-8", "ignore")
        assert given_out == (complete if kind == "byte_level" else complete.removeprefix(" "))
    assert detokenizer.flush() == ""
    assert given_out == tokenizer.decode(ids)


def test_truncated_character_is_replaced_at_the_end(tokenizers):
    tokenizer = tokenizers["fallback_bpe"]
    ids = tokenizer.encode("分")
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.push(ids[:-1]) == ""
    assert detokenizer.flush() == "\ufffd" == tokenizer.decode(ids[:-1])


def test_a_prompt_makes_the_text_a_continuation(tokenizers):
    tokenizer = tokenizers["fallback_bpe"]
    prompt, rest = tokenizer.encode("hello"), tokenizer.encode("world", add_special_tokens=False)
    assert IncrementalDetokenizer(tokenizer).push(rest) == "world"
    assert IncrementalDetokenizer(tokenizer, prompt_token_ids=prompt).push(rest) == " world"
    only_special = IncrementalDetokenizer(tokenizer, prompt_token_ids=[tokenizer.bos_token_id])
    assert only_special.push(rest) == "world"


@pytest.mark.parametrize("kind", ["byte_level", "fallback_bpe"])
def test_a_character_begun_by_the_prompt_is_completed(tokenizers, kind):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode("a👍b", add_special_tokens=False)
    for cut in range(1, len(ids) + 1):
        detokenizer = IncrementalDetokenizer(tokenizer, prompt_token_ids=ids[:cut])
        whole = tokenizer.decode(ids[:cut]).removesuffix("\ufffd")
        assert whole + detokenizer.push(ids[cut:]) == "a👍b"


def test_spaces_between_special_tokens(tokenizers):
    tokenizer = tokenizers["no_decoder"]
    ids = tokenizer.encode("<s></s> hello <s>", add_special_tokens=False)
    shown = {"skip_special_tokens": False}
    assert tokenizer.decode(ids, **shown) == "<s> </s> hello <s>"
    assert tokenizer.decode(ids, **shown, spaces_between_special_tokens=False) == "<s></s> hello <s>"
    assert tokenizer.decode(ids, spaces_between_special_tokens=False) == "hello"


def test_a_special_token_may_follow_one_of_the_prompt(tokenizers):
    """The space between them is left out, or written, as between two tokens of the answer."""
    tokenizer = tokenizers["no_decoder"]
    first, second, word = tokenizer.encode("<s></s> hello", add_special_tokens=False)
    for prompt, spaces, expected in (
        ([first], True, " </s>"),
        ([first], False, "</s>"),
        ([first, word], False, " </s>"),
        ([word, first], False, "</s>"),
    ):
        detokenizer = IncrementalDetokenizer(
            tokenizer, skip_special_tokens=False, spaces_between_special_tokens=spaces, prompt_token_ids=prompt
        )
        assert detokenizer.push([second]) == expected
        whole = tokenizer.decode([*prompt, second], skip_special_tokens=False, spaces_between_special_tokens=spaces)
        assert whole.endswith(expected)


def expected_match(text, stops):
    """By brute force: the stop string that is complete first, the longest of several."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return end, stop
    return None


STOPS = st.lists(st.text("ab分👍", min_size=1, max_size=4), min_size=0, max_size=4, unique=True)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), text=st.text("ab分👍x", max_size=20), stops=STOPS, include=st.booleans())
def test_stop_strings_do_not_depend_on_the_cuts(data, text, stops, include):
    matcher = StopSearch(StopStrings(tuple(stops), include))
    emitted, matched = "", None
    for piece in in_pieces(data, text):
        emit, found = matcher.push(piece)
        emitted += emit
        matched = matched or found
    expected = expected_match(text, stops)
    if expected is None:
        assert matched is None
        assert emitted + matcher.flush() == text
        return
    end, stop = expected
    assert matched == stop
    assert emitted + matcher.flush() == text[: end if include else end - len(stop)]
    assert matcher.push("more") == ("", stop)


@settings(max_examples=150, deadline=None)
@given(text=st.text("abx", max_size=20), stops=STOPS)
def test_only_the_beginning_of_a_stop_string_is_held_back(text, stops):
    matcher = StopSearch(StopStrings(tuple(stops), False))
    emitted = seen = ""
    for character in text:
        emit, matched = matcher.push(character)
        if matched is not None:
            return
        emitted += emit
        seen += character
        longest = max((n for stop in stops for n in range(1, len(stop)) if seen.endswith(stop[:n])), default=0)
        assert len(seen) - len(emitted) == longest


def test_examples():
    assert StopSearch(StopStrings(("lo", "hello"), False)).push("hello there") == ("", "hello")
    assert StopSearch(StopStrings(("abc", "b"), False)).push("abc") == ("a", "b")
    matcher = StopSearch(StopStrings(("abc", "b"), False))
    assert matcher.push("a") == ("", None)
    assert matcher.push("bc") == ("a", "b"), "what was held and is no part of the match"
    matcher = StopSearch(StopStrings(("</end>",), True))
    assert matcher.push("x</e") == ("x</e", None)
    assert matcher.push("nd>yz") == ("nd>", "</end>")
    with pytest.raises(InvalidRequestError, match="empty"):
        StopStrings(("a", ""), False)


def test_a_stop_string_that_begins_inside_a_token_of_bytes(tokenizers):
    """The stop string begins with a character whose bytes lie in several tokens."""
    tokenizer = tokenizers["fallback_bpe"]
    ids = tokenizer.encode("ab👍cd")
    detokenizer, matcher = IncrementalDetokenizer(tokenizer), StopSearch(StopStrings(("👍c",), False))
    emitted, matched = "", None
    for token_id in ids:
        emit, matched = matcher.push(detokenizer.push([token_id]))
        emitted += emit
        if matched:
            break
    assert (emitted, matched) == ("ab", "👍c")


def test_a_piece_is_searched_with_what_may_have_begun_and_no_more(monkeypatch):
    """However long the stop strings are; text that only looks like one of them is let go."""
    searched = []
    find = StopStrings.find

    def counting(stops, text, start):
        searched.append(len(text))
        return find(stops, text, start)

    monkeypatch.setattr(StopStrings, "find", counting)
    matcher = StopSearch(StopStrings(("a" * 500 + "b", "ab" * 200 + "c"), False))
    text = "ab" * 3 + "x" + "xyz" * 1000 + ("a" * 499 + "c" + "ab" * 199) * 20
    emitted = "".join(matcher.push(character)[0] for character in text)
    assert matcher.matched is None
    assert emitted + matcher.flush() == text
    assert max(searched) <= 501
    assert len(searched) < len(text) - 2900, "not where no stop string can have begun"


def test_what_ends_before_the_start_is_not_found_again():
    stops = StopStrings(["ab", "xabz"], False)
    assert stops.find("xab", 3) is None and stops.find("xabab", 3) == (5, "ab")
    assert stops.find("xabz", 3) == (4, "xabz") and stops.find("xab", 2) == (3, "ab")


@settings(max_examples=100, deadline=None)
@given(data=st.data(), text=st.text("ab", max_size=16), stops=STOPS, include=st.booleans())
def test_what_is_ignored_may_be_the_beginning_of_a_match(data, text, stops, include):
    """Stop strings that end before the minimum are text; one that ends behind it may begin before."""
    pieces = in_pieces(data, text)
    minimum = data.draw(st.integers(0, len(pieces)))
    matcher = StopSearch(StopStrings(stops, include))
    emitted, ignored = "", sum(map(len, pieces[:minimum]))
    for place, piece in enumerate(pieces):
        emitted += matcher.push(piece, may_match=place >= minimum)[0]
    ends = [end for end in range(ignored + 1, len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    if not ends:
        assert matcher.matched is None
        assert emitted + matcher.flush() == text
        return
    stop = max((stop for stop in stops if text[: ends[0]].endswith(stop)), key=len)
    assert matcher.matched == stop
    assert emitted == text[: ends[0] if include else ends[0] - len(stop)]


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_offsets_of_a_prompt_are_those_of_the_library(tokenizers, text):
    """Which gives all tokens of one character its place too. It has (0, 0) for a BOS that it adds."""
    tokenizer = tokenizers["byte_level"]
    encoding = tokenizer._backend.encode(text)
    expected = [begin for begin, _ in encoding.offsets]
    assert tokenizer.prompt_offsets(text, encoding.ids) == expected


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data(), text=TEXTS, skip=st.booleans())
def test_the_text_before_an_offset_is_that_of_the_tokens_before(tokenizers, kind, data, text, skip):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    special = sorted(tokenizer.special_token_ids)
    for place in data.draw(st.lists(st.integers(0, len(ids)), max_size=3)):
        ids.insert(place, data.draw(st.sampled_from(special)))
    offsets, whole = tokenizer.text_offsets(5, skip_special_tokens=skip), []
    for part in in_pieces(data, ids):
        whole += offsets.push(part)
    sent = tokenizer.decode(ids, skip_special_tokens=skip)
    for place, offset in enumerate(whole):
        before = tokenizer.decode(ids[:place], skip_special_tokens=skip)
        begun = sent[: offset - 5]
        assert before.startswith(begun) and not before[len(begun) :].strip("\ufffd")


@pytest.mark.parametrize("kind", ["fallback_bpe", "fallback_unigram"])
def test_a_bos_that_the_tokenizer_adds_takes_no_room(tokenizers, kind):
    """Against the library's offsets; both add `<s>`."""
    tokenizer = tokenizers[kind]
    for text in ("hello world", ""):
        encoding = tokenizer._backend.encode(text)
        assert encoding.ids[0] in tokenizer.special_token_ids
        assert tokenizer.prompt_offsets(text, encoding.ids) == [begin for begin, _ in encoding.offsets]
