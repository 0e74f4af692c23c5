"""Token by token to text: whole UTF-8 characters only, and nothing that may still become a stop string.

A byte-level BPE token is a piece of a byte string, and may end inside a character: Chinese characters take three bytes,
emoji four. The bytes run through an incremental UTF-8 decoder, which keeps an unfinished character back, so that the
pieces put together are exactly `tokenizer.decode` of all ids, U+FFFD for invalid bytes included.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

_Utf8 = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """The text of one sample. `stopped` is the stop string that was found, or None.

    token_bytes: of every id, as `Tokenizer.token_bytes` gives them.
    stops: non-empty strings. The one that is complete first ends the text, which keeps what stands before it; among
        those complete at the same character it is the longest. So the outcome does not depend on token boundaries.
    """

    __slots__ = ("_decode", "_held", "_pieces", "_stops", "_token_bytes", "stopped")

    def __init__(self, token_bytes: Sequence[bytes], stops: Sequence[str] = ()) -> None:
        self._token_bytes = token_bytes
        self._decode = _Utf8("replace").decode
        self._stops = tuple(stops)
        self._held = ""
        self._pieces: list[str] = []
        self.stopped: str | None = None

    @property
    def text(self) -> str:
        """What `push` and `flush` have returned so far."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    def push(self, token_id: int) -> str:
        """The text that is certain with one more token; all of it once `stopped`."""
        return self._release(self._decode(self._token_bytes[token_id]))

    def flush(self) -> str:
        """The rest, at the end of the sample: an unfinished character becomes U+FFFD."""
        text = self._release(self._decode(b"", True))
        if self.stopped is None and self._held:
            self._pieces.append(self._held)
            text += self._held
        self._held = ""
        return text

    def _release(self, new: str) -> str:
        if not new or self.stopped is not None:
            return ""
        if self._stops:
            held = self._held + new
            found = [(at + len(stop), at, stop) for stop in self._stops if (at := held.find(stop)) >= 0]
            if found:
                _, cut, self.stopped = min(found)
                self._held = ""
            else:
                cut = len(held) - overlap(held, self._stops)
                self._held = held[cut:]
            new = held[:cut]
        if new:
            self._pieces.append(new)
        return new


def overlap(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that begins one of the stop strings, none of which is in `text`."""
    longest = min(len(text), max(map(len, stops)) - 1)
    for length in range(longest, 0, -1):
        tail = text[-length:]
        if any(stop.startswith(tail) for stop in stops):
            return length
    return 0
