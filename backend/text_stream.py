"""Tokenizers behind one face, and text that streams out of tokens in whole characters."""

import codecs
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer(Protocol):
    """What generation asks of a tokenizer."""

    stop_tokens: tuple[int, ...]
    n_words: int

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Ids of ``text``, with ``bos`` behind the token that begins a conversation."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of ``tokens``; U+FFFD where they end in the middle of a character."""


class ByteTokenizer:
    """Token = byte of UTF-8. Has no begin token, and ids from 256 on have no text."""

    stop_tokens: tuple[int, ...] = ()
    n_words = 256

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """The bytes; an undecodable byte of the command line comes back as that byte."""
        return list(text.encode("utf-8", "surrogateescape"))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text; U+FFFD for what is not UTF-8."""
        return bytes(t for t in tokens if t < 256).decode("utf-8", "replace")


class FileTokenizer:
    """A tokenizer.json (Hugging Face), SentencePiece or tiktoken file, by ``pytorch_tokenizers``.

    Args:
        path: the file. Whether a tokenizer.json has a begin token, its own template decides.

    Raises:
        ValueError: ``pytorch_tokenizers`` cannot read it.
    """

    def __init__(self, path: str | Path) -> None:
        """Read the file."""
        from pytorch_tokenizers import get_tokenizer

        if not Path(path).is_file():
            raise FileNotFoundError(f'tokenizer: expected "bytes" or a file, found none at {path}')
        try:
            self._tokenizer: Any = get_tokenizer(str(path))
        except Exception as error:  # each of its readers raises kinds of its own
            raise ValueError(
                f"tokenizer: {path}: expected a Hugging Face tokenizer.json, a SentencePiece or a "
                f"tiktoken file, pytorch_tokenizers read none: {error}"
            ) from error
        self._has_bos = _is_id(getattr(self._tokenizer, "bos_id", None))
        self.n_words: int = self._tokenizer.n_words
        ends = [*getattr(self._tokenizer, "stop_tokens", ()), self._tokenizer.eos_id]
        self.stop_tokens = tuple(dict.fromkeys(int(t) for t in ends if _is_id(t)))

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Ids; with ``bos`` behind the begin token, where the tokenizer has one."""
        return list(self._tokenizer.encode(text, bos=bos and self._has_bos, eos=False))

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of ``tokens``; a model's vocabulary may be padded, padding has no text."""
        return self._tokenizer.decode([t for t in tokens if t < self.n_words])


def _is_id(token: Any) -> bool:
    return isinstance(token, int) and token >= 0


def load_tokenizer(name: str | Path) -> Tokenizer:
    """``ByteTokenizer`` for "bytes", else ``FileTokenizer`` of that file."""
    return ByteTokenizer() if str(name) == "bytes" else FileTokenizer(name)


class TextStream:
    """Tokens in, text out: each piece as soon as no later token can change it.

    A character may span tokens, and a tokenizer may join words only when it sees two tokens: the
    text of a token is therefore what it adds to the text of those before it, held back while it
    ends in an incomplete character.

    Args:
        tokenizer: what decodes.
        on_text: called with each piece.
    """

    # More than any character needs; text that stays undecodable is then shown as U+FFFD.
    MAX_HELD_TOKENS = 16

    def __init__(self, tokenizer: Tokenizer, on_text: Callable[[str], Any] | None = None) -> None:
        """Begin an empty text."""
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_bytes = isinstance(tokenizer, ByteTokenizer)
        self._shown: list[int] = []  # tokens of the latest piece, the context of the next
        self._held: list[int] = []  # tokens whose text has not been given out
        self._pieces: list[str] = []

    def push(self, token: int) -> None:
        """Take one token; give out what text has become certain."""
        if self._is_bytes:
            self._emit(self._bytes.decode(bytes([token])) if token < 256 else "")
            return
        self._held.append(token)
        text = self._held_text()
        is_certain = text != "" and not text.endswith(REPLACEMENT)
        if is_certain or len(self._held) >= self.MAX_HELD_TOKENS:
            self._release(text)

    def finish(self) -> str:
        """Give out what is held back, an incomplete character as U+FFFD; return the whole text."""
        if self._is_bytes:
            self._emit(self._bytes.decode(b"", final=True))
        elif self._held:
            self._release(self._held_text())
        return "".join(self._pieces)

    def _held_text(self) -> str:
        before = self._tokenizer.decode(self._shown) if self._shown else ""
        return self._tokenizer.decode(self._shown + self._held)[len(before) :]

    def _release(self, text: str) -> None:
        self._emit(text)
        self._shown, self._held = self._held, []

    def _emit(self, text: str) -> None:
        if text:
            self._pieces.append(text)
            if self._on_text is not None:
                self._on_text(text)
