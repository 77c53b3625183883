"""Ids to text one at a time, when a character may be spread over several tokens."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2): printable Latin-1 stands
    for itself, the other bytes follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class ByteStream:
    """Text from tokens that are bytes. A character appears with its last byte; bytes that are no character
    appear as U+FFFD as soon as that is certain."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The text that this token completes; "" while a character is open."""
        return self._decoder.decode(self._bytes_of(token))

    def close(self) -> str:
        """What is left of a character that never ended."""
        return self._decoder.decode(b"", final=True)


class WindowStream:
    """Text from tokens of any decoder, by decoding the last few tokens with and without the new one.

    A decoder may treat a token by what stands before it (a leading blank is dropped only at the start), so
    the window always begins one whole piece of text back.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._shown = 0
        """How many ids of the window are shown."""

    def feed(self, token: int) -> str:
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith(REPLACEMENT):
            return ""
        return self._advance(text)

    def close(self) -> str:
        return self._advance(self._decode(self._ids))

    def _advance(self, text: str) -> str:
        before = self._decode(self._ids[: self._shown])
        if not text.startswith(before):  # the decoder changed its mind about an earlier piece
            before = text[: len(before)]
        if len(text) > len(before):
            self._ids = self._ids[self._shown :]
            self._shown = len(self._ids)
        return text[len(before) :]


TextStream = ByteStream | WindowStream
