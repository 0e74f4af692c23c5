from hypothesis import example, given, settings
from hypothesis import strategies as st

from minimind.inference.request_state import Detokenizer
from tests.inference.small import small_tokenizer

TOKENIZER = small_tokenizer()
TABLE = TOKENIZER.token_bytes()
# bytes of Chinese characters and emoji, whole and cut, among all tokens
CUTS = [i for i, piece in enumerate(TABLE) if piece and piece[0] >= 0x80]
IDS = st.lists(st.one_of(st.sampled_from(CUTS), st.integers(0, TOKENIZER.vocab_size - 1)), max_size=40)


def pieces(ids, stops=()):
    detokenizer = Detokenizer(TABLE, stops)
    out = []
    for token in ids:
        out.append(detokenizer.push(token))
        if detokenizer.stopped is not None:
            break
    out.append(detokenizer.flush())
    assert "".join(out) == detokenizer.text
    return out, detokenizer


@settings(max_examples=300, deadline=None)
@given(IDS)
def test_pieces_join_to_the_decoded_text(ids):
    assert "".join(pieces(ids)[0]) == TOKENIZER.decode(ids, skip_special_tokens=True)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="你好世界😀👍🏽👨‍👩‍👧é aZ\n€", max_size=30))
def test_characters_are_never_split(text):
    ids = TOKENIZER.encode(text, allow_special=False)
    out, _ = pieces(ids)
    assert "".join(out) == text
    assert "�" not in "".join(out)
    assert out[-1] == ""  # nothing was left for the end


def test_an_emoji_of_several_tokens_comes_with_the_last():
    ids = TOKENIZER.encode("🦊")
    assert len(ids) == 3
    assert pieces(ids)[0] == ["", "", "🦊", ""]
    assert pieces(ids[:2])[0] == ["", "", "�"]


def test_control_tokens_add_nothing_and_markup_stays():
    ids = TOKENIZER.encode("<think>a</think><|im_end|>b")
    assert "".join(pieces(ids)[0]) == "<think>a</think>b"


def stopped_text(text, stops):
    """The naive rule: read character by character until one stop string is complete; the longest of those."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


# single letters, and tokens that hold several, so that one token can complete more than one stop string
LETTERS = [i for i, piece in enumerate(TABLE) if piece and set(piece) <= set(b"helo")]
H, L, HELLO = (TOKENIZER.encode(text)[0] for text in ("h", "l", "hello"))


@settings(max_examples=400, deadline=None)
@example([HELLO], ["ell", "l"])
@example([HELLO], ["ell", "l", "el"])
@example([L, L, L, H], ["llh"])
@given(
    st.lists(st.sampled_from(LETTERS), max_size=25),
    st.lists(st.text(alphabet="helo", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings_against_reading_character_by_character(ids, stops):
    text = TOKENIZER.decode(ids, skip_special_tokens=True)
    expected, stop = stopped_text(text, stops)
    out, detokenizer = pieces(ids, stops)
    assert detokenizer.text == expected
    assert detokenizer.stopped == stop
    # what was released never had to be taken back, and no more was held than a stop string may need
    released = ""
    for i, piece in enumerate(out[:-1]):
        released += piece
        assert expected.startswith(released)
        if stop is None:
            so_far = TOKENIZER.decode(ids[: i + 1], skip_special_tokens=True)
            assert len(so_far) - len(released) < max(map(len, stops))


def test_a_stop_string_of_chinese_across_tokens():
    ids = TOKENIZER.encode("hello 界世世界 hello")
    out, detokenizer = pieces(ids, ["世界"])
    assert (detokenizer.text, detokenizer.stopped) == ("hello 界世", "世界")
    assert not any("�" in piece for piece in out)


def test_held_text_is_returned_at_the_end():
    ids = TOKENIZER.encode("hello wor")
    assert "".join(pieces(ids, ["world"])[0]) == "hello wor"
