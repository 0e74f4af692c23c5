"""Load and use a tokenizer folder in Hugging Face's layout: tokenizer.json, tokenizer_config.json, chat_template.jinja.

It needs only the `tokenizers` library, so that data workers start without torch or transformers.

Long texts are encoded in parts, since the Rust library needs some 130 bytes of memory for each byte of a text. A text
is cut only where the tokens of the surrounding stretch are the same with and without the cut. At the end of a word,
where byte-level BPE divides a text before merging, this holds for the whole text; within a long run without words (an
encoded file, a genome) it holds for the thousand characters around.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from numpy.typing import DTypeLike

from minimind.tokenization.chat_template import Message, render_chat
from minimind.tokenization.training import BOS, EOS, PAD

DEFAULT_FOLDER = Path(__file__).parent / "default"
MODEL_FILE, CONFIG_FILE, TEMPLATE_FILE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
# The parts of tokenizer.json that determine the ids of a text; encode() never runs the post-processor.
_ID_FIELDS = ("added_tokens", "normalizer", "pre_tokenizer", "model")
AllowSpecial = bool | Literal["markup"]


def load_tokenizer(path: str | Path | None = None) -> Tokenizer:
    """Load a tokenizer from a folder, from its tokenizer.json, or from the newest checkpoint of a run folder. None
    loads the one shipped with MiniMind.

    Raises ValueError naming the file that is missing or broken.
    """
    place = DEFAULT_FOLDER if path is None else Path(path).expanduser()
    if place.is_dir() and not (place / MODEL_FILE).exists():
        place = max(place.glob("checkpoints/step-*"), default=place)
    folder = place if place.is_dir() else place.parent
    model_file = folder / MODEL_FILE if place.is_dir() else place
    model = _load_model(model_file)
    config = _load_config(folder / CONFIG_FILE)
    template = _load_template(folder / TEMPLATE_FILE, config)
    return Tokenizer(model, config, template, source=str(model_file))


def tokenizer_beside(weights: Path) -> Tokenizer | None:
    """The tokenizer that weights were trained with: the one in the folder of the weights, or None."""
    folder = weights if weights.is_dir() else weights.parent
    return load_tokenizer(folder) if (folder / MODEL_FILE).is_file() else None


def require_same_ids(
    tokenizer: Tokenizer, flag: str, trained_with: Tokenizer, place: str | Path, way_out: str, new: bool = False
) -> None:
    """Raise ValueError, in one line, unless both tokenizers give every text the same ids or `new` is set.

    flag: the flag that chose `tokenizer`, such as "--tokenizer my/folder"; place: the owner of `trained_with`; way_out:
    the advice in the message.
    """
    if not new and tokenizer.fingerprint != trained_with.fingerprint:
        raise ValueError(
            f"{flag}: a tokenizer of {tokenizer.described}, and that of {place} is one of {trained_with.described}: "
            f"the same ids mean other words; {way_out}"
        )


class Tokenizer:
    """Converts text to token ids and back, and conversations to text.

    vocab_size: number of entries, special tokens included; every id is below it.
    bos_token_id, eos_token_id, pad_token_id: bos and pad default to eos if the folder does not name them.
    special_tokens: the ids of all added tokens, such as <|im_end|> and <think>.
    control_tokens: the ids of those that are not markup: <|im_end|>, but not <think>.
    fingerprint: hex SHA-256 of everything that determines the ids; equal on every machine.
    dtype: np.uint16 if all ids fit, else np.uint32.
    """

    def __init__(self, model: tokenizers.Tokenizer, config: dict[str, Any], template: str | None, source: str) -> None:
        model.no_truncation()
        model.no_padding()
        self._model, self._config, self._template, self._source = model, config, template, source
        content = json.loads(model.to_str())
        added = content["added_tokens"]
        markup = [token for token in added if not token["special"]]
        self._by_special: dict[AllowSpecial, tokenizers.Tokenizer] = {True: model}
        self._by_special["markup"] = tokenizers.Tokenizer.from_str(json.dumps({**content, "added_tokens": markup}))
        self._by_special[False] = tokenizers.Tokenizer.from_str(json.dumps({**content, "added_tokens": []}))
        self.control_tokens = {token["content"]: int(token["id"]) for token in added if token["special"]}
        self.fingerprint = _fingerprint(content)
        self.special_tokens = {token["content"]: int(token["id"]) for token in content["added_tokens"]}
        self.vocab_size = 1 + max(model.get_vocab(with_added_tokens=True).values())
        self.dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        eos = self._named("eos_token", EOS)
        if eos is None:
            raise ValueError(f'{source}: no end-of-sequence token; name it as "eos_token" in {CONFIG_FILE}')
        bos, pad = self._named("bos_token", BOS), self._named("pad_token", PAD)
        self.eos_token_id = eos
        self.bos_token_id = eos if bos is None else bos
        self.pad_token_id = eos if pad is None else pad

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"Tokenizer({self._source!r}, vocab_size={self.vocab_size})"

    @property
    def described(self) -> str:
        """Size and beginning of the fingerprint, for error messages."""
        return f"{self.vocab_size} entries ({self.fingerprint[:8]})"

    @property
    def chat_template(self) -> str | None:
        """The Jinja2 source that apply_chat_template renders, or None."""
        return self._template

    def token_to_id(self, token: str) -> int | None:
        """The id of a vocabulary entry, special tokens included, or None."""
        return self._model.token_to_id(token)

    def token_of(self, token_id: int) -> str:
        """The vocabulary entry with that id."""
        token = self._model.id_to_token(token_id)
        assert token is not None, token_id
        return token

    def encode(self, text: str, allow_special: AllowSpecial = True) -> list[int]:
        """Token ids of `text`; nothing is added before or after.

        allow_special: encode names of special tokens, such as "<|im_end|>", as these tokens. Use False for untrusted
            text, in which they are ordinary characters. "markup" encodes <think> and the like as tokens, but not
            control tokens.
        """
        model = self._by_special[allow_special]
        if is_long(text):
            return encode_long(model, text, self.dtype).tolist()
        try:
            return model.encode(text, add_special_tokens=False).ids
        except TypeError:  # the Rust library rejects lone surrogates
            return model.encode(without_surrogates(text), add_special_tokens=False).ids

    def offsets(self, text: str, allow_special: AllowSpecial = True) -> np.ndarray:
        """int64 [length, 2]: begin and end in `text` of each token of `encode`, in characters."""
        return offsets_of(self._by_special[allow_special], without_surrogates(text))

    def encode_batch(self, texts: Sequence[str], allow_special: AllowSpecial = True) -> list[np.ndarray]:
        """`encode` for many texts on all cores: one array [length] of self.dtype for each. It needs some 130 bytes of
        memory for each byte of text; long texts are encoded in parts."""
        model = self._by_special[allow_special]
        short = iter(encode_many(model, [text for text in texts if not is_long(text)], self.dtype))
        return [encode_long(model, text, self.dtype) if is_long(text) else next(short) for text in texts]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8, such as a part of a character, become U+FFFD.

        skip_special_tokens: leave out control tokens such as <|im_end|>; <think> and <tool_call> stay.
        Raises ValueError for an id outside the vocabulary.
        """
        numbers = [int(i) for i in ids]
        wrong = next((i for i in numbers if not 0 <= i < self.vocab_size), None)
        if wrong is not None:
            raise ValueError(f"token id {wrong} is outside the vocabulary of {self.vocab_size}")
        return self._model.decode(numbers, skip_special_tokens=skip_special_tokens)

    def token_bytes(self) -> list[bytes]:
        """The bytes of each id, b"" for control tokens such as <|im_end|>, for decoding token by token. Joined and
        decoded as UTF-8 with U+FFFD for invalid bytes, they equal decode(ids, skip_special_tokens=True).

        Raises ValueError unless the tokenizer is byte-level, as MiniMind's, Llama 3's and Qwen's are.
        """
        decoder = type(self._model.decoder).__name__
        if decoder != "ByteLevel":
            raise ValueError(f"{self._source}: its decoder is {decoder}; text streams from byte-level BPE only")
        byte_of = {character: value for value, character in enumerate(byte_characters())}
        control = {i for i, token in self._model.get_added_tokens_decoder().items() if token.special}
        out = [b""] * self.vocab_size
        for token, i in self._model.get_vocab(with_added_tokens=True).items():
            if i not in control:
                byte_level = all(character in byte_of for character in token)
                out[i] = bytes(byte_of[c] for c in token) if byte_level else token.encode()
        return out

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | str | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The text of a conversation, to be encoded with allow_special=True; see `render_chat`.

        The shipped template uses `enable_thinking` (or `open_thinking`): True opens a reasoning block in the generation
        prompt, False writes an empty one there and in replies without reasoning; if it is not set, it adds nothing. The
        text of the first k messages is a prefix of the text of all of them. Raises ValueError if the folder has no
        template or the messages do not fit it.
        """
        template = self.require_chat_template()
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        tokens = {name: token for name in names if (token := _content(self._config.get(name))) is not None}
        return render_chat(template, messages, tools, add_generation_prompt, **{**tokens, **variables})

    def require_chat_template(self) -> str:
        """The chat template. Raises ValueError if the folder has none."""
        if self._template is None:
            raise ValueError(
                f'{self._source}: no chat template; add {TEMPLATE_FILE} or "chat_template" in {CONFIG_FILE}'
            )
        return self._template

    def with_model(self, model: tokenizers.Tokenizer) -> Tokenizer:
        """A tokenizer with a new vocabulary, as train_bpe returns it, and this one's settings and chat template."""
        return Tokenizer(model, self._config, self._template, source="trained tokenizer")

    def save(self, folder: str | Path) -> None:
        """Write a folder that load_tokenizer and transformers' AutoTokenizer can load, with the same ids."""
        out = Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        config = {key: value for key, value in self._config.items() if key != "chat_template"}
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        for name in ("bos_token", "eos_token", "pad_token"):
            config.setdefault(name, self._model.id_to_token(getattr(self, f"{name}_id")))
        if self._template is not None:
            config["chat_template"] = self._template
        _write(out / MODEL_FILE, self._model.to_str(pretty=True))
        _write(out / CONFIG_FILE, json.dumps(config, ensure_ascii=False, indent=2))

    def _named(self, name: str, default: str) -> int | None:
        token = _content(self._config.get(name)) or default
        token_id = self._model.token_to_id(token)
        if token_id is None and token != default:
            raise ValueError(f"{self._source}: {name} {token!r} of {CONFIG_FILE} is not in the vocabulary")
        return token_id


def byte_characters() -> str:
    """The 256 characters that stand for bytes in byte-level BPE (GPT-2): printable Latin-1 characters for themselves,
    U+0100 and up for the others."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = iter(range(0x100, 0x200))
    return "".join(chr(value if value in printable else next(shifted)) for value in range(256))


def _fingerprint(content: dict[str, Any]) -> str:
    fields = {name: content[name] for name in _ID_FIELDS}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _content(token: Any) -> str | None:
    """The text of a token in tokenizer_config.json, which is a string or an object with "content"."""
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else None


def _load_model(path: Path) -> tokenizers.Tokenizer:
    text = _read(path, f"{path}: no tokenizer here; give a folder with {MODEL_FILE} or leave the path out")
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the Rust library raises bare Exception
        reason = _one_line(error)
        raise ValueError(f"{path}: not a tokenizer file ({reason}); download or train it again") from None


def _load_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(_read(path, f"{path}: missing"))
    except json.JSONDecodeError as error:
        reason = f"malformed JSON: {error.msg} at line {error.lineno}"
        raise ValueError(f"{path}: {reason}; download it again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: not a JSON object; download it again")
    return config


def _load_template(path: Path, config: dict[str, Any]) -> str | None:
    if path.is_file():
        return _read(path, f"{path}: missing")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _read(path: Path, missing: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(missing) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({_one_line(error)})") from None


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8", newline="\n")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


PART = 1 << 15  # characters from cut to cut
LONG = 2 * PART  # a shorter text is not cut
TOGETHER = 4  # parts encoded at once
MOST_UNCUT = 1 << 22  # characters
_SURROGATE = re.compile("[\ud800-\udfff]")
_AROUND = 512  # characters on each side of a cut
_TRIES = 8  # consecutive stretches in which to look for a cut


def is_long(text: Any) -> bool:
    """Whether `text` needs `encode_long`."""
    return isinstance(text, str) and len(text) > LONG


def encode_many(model: tokenizers.Tokenizer, texts: Sequence[str], dtype: DTypeLike) -> list[np.ndarray]:
    """The ids of each of `texts`, dtype [length], on all cores."""
    try:
        encodings = model.encode_batch_fast(list(texts), add_special_tokens=False)
    except TypeError:  # the Rust library rejects lone surrogates
        clean = [without_surrogates(text) for text in texts]
        encodings = model.encode_batch_fast(clean, add_special_tokens=False)
    return [np.array(encoding.ids, dtype) for encoding in encodings]


def encode_long(model: tokenizers.Tokenizer, text: str, dtype: DTypeLike) -> np.ndarray:
    """The ids of a text of any length, dtype [length], in bounded memory besides text and ids. Raises ValueError if
    more than MOST_UNCUT characters cannot be cut, as with a tokenizer that treats the beginning of a text specially."""
    text = without_surrogates(text) if _SURROGATE.search(text) else text
    parts, ids = _parts(model, text), list[np.ndarray]()
    while group := list(islice(parts, TOGETHER)):
        ids += encode_many(model, group, dtype)
    return np.concatenate(ids)


def offsets_of(model: tokenizers.Tokenizer, text: str) -> np.ndarray:
    """int64 [length, 2]: begin and end of each token in a text of any length, in characters."""
    begin, offsets = 0, list[np.ndarray]()
    for part in _parts(model, text):
        pairs = model.encode(part, add_special_tokens=False).offsets
        offsets.append(np.array(pairs, np.int64).reshape(-1, 2) + begin)
        begin += len(part)
    return np.concatenate(offsets)


def without_surrogates(text: str) -> str:
    """Join surrogate pairs and replace lone surrogates, which JSON escapes can produce and UTF-8 cannot hold."""
    if not isinstance(text, str):
        raise TypeError(f"a text must be a str, not {type(text).__name__}")
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _parts(model: tokenizers.Tokenizer, text: str) -> Iterator[str]:
    begin = near = 0
    while len(text) - near > LONG:
        near += PART
        tries = (_cut(model, text, near + 2 * _AROUND * i) for i in range(_TRIES))
        cut = next((place for place in tries if place), None)
        if cut is not None:
            yield text[begin:cut]
            begin = near = cut
        elif near - begin > MOST_UNCUT:
            raise ValueError(
                f"a text of {len(text):,} characters cannot be cut without changing its tokens; "
                "divide it into several rows"
            )
    yield text[begin:]


def _cut(model: tokenizers.Tokenizer, text: str, near: int) -> int | None:
    """A place near `near` where a cut changes no token: the end of a word, or else between any two tokens, or None."""
    first = near - _AROUND
    stretch = text[first : near + _AROUND]
    whole = model.encode(stretch, add_special_tokens=False)
    ids, ends = whole.ids, [end for _, end in whole.offsets[:-1]]
    inner = [i for i, end in enumerate(ends) if _AROUND // 2 <= end <= 3 * _AROUND // 2]
    words = [i for i in inner if stretch[ends[i] - 1].isalpha() and stretch[ends[i]] in " \n,.;，。；"]
    for i in [*words[:4], *inner[:4]]:
        sides = encode_many(model, [stretch[: ends[i]], stretch[ends[i] :]], np.int64)
        if np.concatenate(sides).tolist() == ids:
            return first + ends[i]
    return None
