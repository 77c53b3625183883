"""The text of a completion as it grows, up to the first stop string."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from llmtrainer.core.protocols import TextStream


class Growing:
    """Gives out the text of one completion piece by piece, and never a character of a stop string.

    Read character after character, the text ends where the first stop string is complete, and is cut before it
    (before the longest, if several end there). So the cut depends on no border between tokens, and what may yet
    become a stop string is held back until it is certain.
    """

    def __init__(
        self,
        stream: TextStream,
        before: Sequence[int],
        *,
        silent: Collection[int] = (),
        stop: Sequence[str] = (),
        unsearched: int = 0,
    ) -> None:
        """`before`: the prompt's ids. `silent`: ids that have no text. `unsearched`: the first tokens, in which no
        stop string is looked for."""
        self._stream, self._silent, self._stop = stream, silent, stop
        self._unsearched = unsearched
        self._held = ""
        self.stopped = False
        """Whether a stop string was found."""
        for token in before:    # what comes next may depend on it
            stream.feed(token)

    def feed(self, token: int) -> str:
        """The text that is certain now."""
        text = "" if token in self._silent else self._stream.feed(token)
        if self._unsearched > 0:
            self._unsearched -= 1
            return text
        return self._search(text)

    def close(self) -> str:
        """The rest, once no token will follow."""
        text = self._search("" if self.stopped else self._stream.close())
        rest, self._held = self._held, ""
        return text + rest

    def _search(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        certain = len(text) - max((_begun(text, stop) for stop in self._stop), default=0)
        self._held = text[certain:]
        return text[:certain]


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of a stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
