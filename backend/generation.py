"""Text out of a loaded model: the C++ decode loop, driven from Python.

    generate_tokens(model, [1, 15043], max_new_tokens=20)     ids in, ids out
    generate_text(model, tokenizer, "Once", on_text=print)    text in, text out as it comes

The loop itself is C++ (runtime/decoder.h); this file hands it the prompt and its callbacks.
Tokenizers and the streaming of text are in text_stream.py.
"""

import ctypes
import signal
import threading
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from . import _native
from .text_stream import ByteTokenizer, TextStream, Tokenizer

STOP_REASONS = ("max_new_tokens", "stop_token", "end_of_context", "interrupted")


@dataclass(frozen=True)
class DecodeInfo:
    """What a language model says of itself, its constant methods' defaults filled in."""

    max_context_len: int
    max_seq_len: int
    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    max_sequences: int = 1  # that one forward takes


@dataclass(frozen=True)
class GenerationStats:
    """Times of one generation; seconds, bytes, tokens per second (0 where nothing was timed).

    ``peak_memory_bytes`` is the process's, ``peak_device_memory_bytes`` the model's on the GPU (on
    the CPU 0).
    """

    stop_reason: str
    prompt_tokens: int
    new_tokens: int
    load_s: float
    prefill_s: float
    decode_s: float
    time_to_first_token_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    peak_memory_bytes: int
    peak_device_memory_bytes: int

    @classmethod
    def from_native(cls, native: _native.GenerateStats) -> "GenerationStats":
        """Read the C struct; the first new token comes out of the prefill, hence the - 1."""
        n_decoded = native.new_tokens - 1
        return cls(
            stop_reason=STOP_REASONS[native.stop_reason],
            prompt_tokens=native.prompt_tokens,
            new_tokens=native.new_tokens,
            load_s=native.load_s,
            prefill_s=native.prefill_s,
            decode_s=native.decode_s,
            time_to_first_token_s=native.time_to_first_token_s,
            prefill_tokens_per_s=_rate(native.prompt_tokens, native.prefill_s),
            decode_tokens_per_s=_rate(n_decoded, native.decode_s),
            peak_memory_bytes=native.peak_memory_bytes,
            peak_device_memory_bytes=native.peak_device_memory_bytes,
        )

    def __str__(self) -> str:
        """The lines that cuda-int4-decode prints."""
        gpu = self.peak_device_memory_bytes / 2**20
        return (
            f"load {self.load_s:.2f} s, peak memory {self.peak_memory_bytes / 2**20:.1f} MiB"
            f"{f', {gpu:.1f} MiB on the GPU' if gpu else ''}\n"
            f"prompt {self.prompt_tokens} tokens, {self.prefill_tokens_per_s:.1f} tokens/s, "
            f"first token after {self.time_to_first_token_s:.3f} s\n"
            f"decoded {self.new_tokens} tokens, {self.decode_tokens_per_s:.1f} tokens/s, "
            f"ended by {self.stop_reason}"
        )


def _rate(n_tokens: int, seconds: float) -> float:
    return n_tokens / seconds if seconds > 0 else 0.0


@dataclass(frozen=True)
class Generation:
    """What a generation gave.

    Attributes:
        tokens: the ids chosen, a stop token included.
        stats: times, and why it ended.
        text: what the tokens say, without a stop token; None from ``generate_tokens``.
    """

    tokens: list[int]
    stats: GenerationStats
    text: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values: what ``cuda-int4 run --json`` prints."""
        text = {} if self.text is None else {"text": self.text}
        return {"tokens": self.tokens, **text, **asdict(self.stats)}


class GenerationInterrupted(KeyboardInterrupt):
    """Ctrl-C during a generation; ``generation`` is what there was of it by then."""

    def __init__(self, generation: Generation) -> None:
        """Keep what was generated before the interrupt."""
        super().__init__("interrupted")
        self.generation = generation


def decode_info(model: Any) -> DecodeInfo:
    """What the loaded ``model`` says of itself as a language model.

    Raises:
        CudaInt4Error: it is none that the decode loop can drive; the reason says what is missing.
    """
    native = _native.DecodeInfo()
    _native.check(_native.library().model_decode_info(model.handle, _native.byref(native)))
    return DecodeInfo(
        max_context_len=native.max_context_len,
        max_seq_len=native.max_seq_len,
        vocab_size=native.vocab_size,
        bos_id=native.bos_id if native.bos_id >= 0 else None,
        eos_ids=tuple(native.eos_ids[: native.n_eos_ids]),
        max_sequences=native.max_sequences,
    )


def generate_tokens(
    model: Any,
    prompt: Sequence[int],
    *,
    start_pos: int = 0,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    sequence: int = 0,
    stop_tokens: Sequence[int] = (),
    prefill_chunk: int | None = None,
    on_token: Callable[[int], Any] | None = None,
    on_prefill: Callable[[int], Any] | None = None,
) -> Generation:
    """Read ``prompt``, then choose tokens until something ends it.

    Args:
        model: from ``cuda_int4.load``.
        prompt: token ids, one at least.
        start_pos: tokens of the conversation that are in the cache already; 0 is a new one. To go
            on after a generation: ``start_pos + prompt_tokens + new_tokens - 1``, with the last
            token chosen as the first of the next prompt (it has not been through the model).
        max_new_tokens: None is until a stop token or the end of the context.
        temperature: 0 takes the likeliest token, the lowest id of equals.
        top_k: draw from the k likeliest only; 0 is off.
        top_p: then from the fewest likeliest that hold this probability; 1 is off.
        min_p: then from those at least this times as likely as the likeliest; 0 is off.
        seed: the same seed gives the same tokens, on any machine.
        sequence: draws of one seed are independent from one number to another.
        stop_tokens: ids that end the generation, besides the model's ``get_eos_ids``.
        prefill_chunk: prompt tokens per forward; None is as many as the model takes.
        on_token: called with each token as it is chosen; what it raises ends the generation and is
            raised from here.
        on_prefill: the same after each chunk of the prompt, with the tokens read so far.

    Raises:
        ValueError: an integer out of its range.
        CudaInt4Error: the prompt does not fit, a token is not in the vocabulary, temperature,
            top_p or min_p is out of its range, the model failed or gave NaN; the text says which.
        GenerationInterrupted: Ctrl-C; it carries the tokens up to then.
    """
    _check_ints(start_pos, max_new_tokens, prefill_chunk, top_k, seed, sequence)
    tokens: list[int] = []
    interrupts = _Interrupts()
    raised: list[BaseException] = []  # a C callback cannot raise: keep it until the call is over

    def guard(callback: Callable[[int], Any]) -> Callable[[int, Any], int]:
        def call(value: int, _user: Any) -> int:
            try:
                callback(value)
            except BaseException as error:
                raised.append(error)
            return int(bool(raised) or interrupts.seen)

        return call

    def take(token: int) -> None:
        tokens.append(token)
        if on_token is not None:
            on_token(token)

    ids, stops = _int64_array("prompt", prompt), _int64_array("stop_tokens", stop_tokens)
    native = _native.GenerateConfig(
        max_new_tokens=max_new_tokens or 0,
        prefill_chunk=prefill_chunk or 0,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        sequence=sequence,
        stop_tokens=(ctypes.c_int64 * len(stops)).from_buffer(stops),
        n_stop_tokens=len(stops),
        on_prefill=_native.PrefillCallback(guard(on_prefill or (lambda n_read: None))),
    )
    stats = _native.GenerateStats()
    with interrupts, model.generating() as handle:
        code = _native.library().generate(
            handle,
            (ctypes.c_int64 * len(ids)).from_buffer(ids),
            len(ids),
            start_pos,
            _native.byref(native),
            _native.TokenCallback(guard(take)),
            None,
            _native.byref(stats),
        )
    generation = Generation(tokens, GenerationStats.from_native(stats))
    if interrupts.seen or (raised and isinstance(raised[0], KeyboardInterrupt)):
        raise GenerationInterrupted(generation) from (raised[0] if raised else None)
    if raised:
        raise raised[0]
    _native.check(code)
    return generation


def _int64_array(name: str, values: Sequence[int]) -> array:
    try:
        return array("q", values)
    except OverflowError:
        raise ValueError(f"generate: expected {name} of int64 ids, got a greater number") from None


def _check_ints(
    start_pos: int,
    max_new_tokens: int | None,
    prefill_chunk: int | None,
    top_k: int,
    seed: int,
    sequence: int,
) -> None:
    """Refuse what does not fit the C struct, which would wrap around without a word.

    Raises:
        ValueError: an argument out of its range.
    """
    ranges = {
        "start_pos": (start_pos, 0, 2**63),
        "max_new_tokens": (1 if max_new_tokens is None else max_new_tokens, 1, 2**63),
        "prefill_chunk": (1 if prefill_chunk is None else prefill_chunk, 1, 2**63),
        "top_k": (top_k, 0, 2**63),
        "seed": (seed, 0, 2**64),
        "sequence": (sequence, 0, 2**64),
    }
    for name, (value, low, end) in ranges.items():
        if not low <= value < end:
            raise ValueError(f"generate: expected {name} in {low}..{end - 1}, got {value}")


class _Interrupts:
    """While entered, Ctrl-C sets ``seen`` and raises nothing.

    Python would raise KeyboardInterrupt in whatever line of a callback comes first, and ctypes
    drops what a callback raises before its own ``try``. Only the default handling is replaced, and
    only in the main thread, where Python runs its handlers.
    """

    def __init__(self) -> None:
        """None seen yet."""
        self.seen = False
        self._replaced = False

    def __enter__(self) -> None:
        """Take the place of Python's handler."""
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ):
            signal.signal(signal.SIGINT, self._see)
            self._replaced = True

    def __exit__(self, *_: object) -> None:
        """Give it back."""
        if self._replaced:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _see(self, _signal: int, _frame: object) -> None:
        self.seen = True


def generate_text(
    model: Any,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    on_text: Callable[[str], Any] | None = None,
    bos: bool = True,
    stop_tokens: Sequence[int] = (),
    **options: Any,
) -> Generation:
    """Continue ``prompt``; the text comes in whole characters as soon as they are certain.

    Args:
        model: from ``cuda_int4.load``.
        tokenizer: from ``load_tokenizer``.
        prompt: at least one token long.
        on_text: called with each new piece of text.
        bos: put the begin token in front: the tokenizer's; for bytes the model's ``get_bos_id``.
        stop_tokens: besides the model's and the tokenizer's own end tokens.
        **options: as for ``generate_tokens``.

    Raises:
        GenerationInterrupted: Ctrl-C; it carries tokens and text up to then.
    """
    info = decode_info(model)
    stops = sorted({*stop_tokens, *tokenizer.stop_tokens, *info.eos_ids})
    tokens = encoded(tokenizer, prompt, info, bos=bos)
    stream = TextStream(tokenizer, on_text)
    on_token = options.pop("on_token", None)

    def take(token: int) -> None:
        if token not in stops:
            stream.push(token)
        if on_token is not None:
            on_token(token)

    try:
        generation = model.generate(tokens, stop_tokens=stops, on_token=take, **options)
    except GenerationInterrupted as interrupted:
        generation = interrupted.generation
        text = stream.finish()
        raise GenerationInterrupted(Generation(generation.tokens, generation.stats, text)) from None
    return Generation(generation.tokens, generation.stats, stream.finish())


def encoded(tokenizer: Tokenizer, prompt: str, info: DecodeInfo, *, bos: bool) -> list[int]:
    """Tokens of ``prompt``, the begin token in front; for bytes the model says which that is."""
    tokens = tokenizer.encode(prompt, bos=bos)
    if bos and isinstance(tokenizer, ByteTokenizer) and info.bos_id is not None:
        tokens.insert(0, info.bos_id)
    return tokens
