"""Several prompts at once: rows of one batch, each a conversation of its own.

    generate_token_batch(model, [[1, 15043], [1]], max_new_tokens=20)      ids in, ids out
    generate_text_batch(model, tokenizer, ["Once", "def"])                 text in, text out

For models of which ``get_max_batch`` is above 1 (runtime/decoder.h says what such a model is). More
prompts than that are taken in groups, in their order; a model of one sequence takes them one by
one. What is drawn for a prompt depends on its place among all of them and on nothing else: not on
its group, nor on the other prompts.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from . import _native
from .generation import (
    DecodeInfo,
    Generation,
    GenerationStats,
    _check_ints,
    _int64_array,
    _Interrupts,
    _rate,
    decode_info,
    encoded,
)
from .text_stream import TextStream, Tokenizer


@dataclass(frozen=True)
class BatchStats:
    """Times of all prompts together; seconds, bytes, tokens per second (0 where nothing was timed).

    Attributes:
        n_prompts: all of them.
        n_at_once: of them in one call, at most.
        prompt_tokens: read.
        new_tokens: chosen.
        load_s: of the model.
        prefill_s: reading the prompts.
        decode_s: from the first token of each group to its last.
        prefill_tokens_per_s: of all prompts together.
        decode_tokens_per_s: of all sequences together.
        decode_tokens_per_s_each: of one of them, the mean.
        peak_memory_bytes: of the process.
        peak_device_memory_bytes: of the model on the GPU; 0 on the CPU.
    """

    n_prompts: int
    n_at_once: int
    prompt_tokens: int
    new_tokens: int
    load_s: float
    prefill_s: float
    decode_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    decode_tokens_per_s_each: float
    peak_memory_bytes: int
    peak_device_memory_bytes: int

    def __str__(self) -> str:
        """Lines like those of one generation."""
        gpu = self.peak_device_memory_bytes / 2**20
        return (
            f"load {self.load_s:.2f} s, peak memory {self.peak_memory_bytes / 2**20:.1f} MiB"
            f"{f', {gpu:.1f} MiB on the GPU' if gpu else ''}\n"
            f"{self.n_prompts} prompts of {self.prompt_tokens} tokens, {self.n_at_once} at once, "
            f"{self.prefill_tokens_per_s:.1f} tokens/s\n"
            f"decoded {self.new_tokens} tokens, {self.decode_tokens_per_s:.1f} tokens/s in all, "
            f"{self.decode_tokens_per_s_each:.1f} tokens/s each"
        )


@dataclass(frozen=True)
class BatchGeneration:
    """What all prompts gave, in their order."""

    generations: list[Generation]
    stats: BatchStats

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values: what ``cuda-int4 run --prompts --json`` prints."""
        each = [generation.as_dict() for generation in self.generations]
        return {"sequences": each, "total": asdict(self.stats)}


class BatchInterrupted(KeyboardInterrupt):
    """Ctrl-C during a batch; ``batch`` is what there was of it by then.

    Prompts that had no turn yet have no tokens.
    """

    def __init__(self, batch: BatchGeneration) -> None:
        """Keep what was generated before the interrupt."""
        super().__init__("interrupted")
        self.batch = batch


def generate_token_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    sequence: int = 0,
    stop_tokens: Sequence[int] = (),
    prefill_chunk: int | None = None,
    on_token: Callable[[int, int], Any] | None = None,
    on_end: Callable[[int, list[int]], Any] | None = None,
) -> BatchGeneration:
    """Read ``prompts``, then choose tokens for each until something ends it.

    Args:
        model: from ``cuda_int4.load``; new conversations, whatever it held before.
        prompts: token ids, one at least in each.
        max_new_tokens: of each prompt; None is until a stop token or the end of the context.
        temperature: 0 takes the likeliest token, the lowest id of equals.
        top_k: draw from the k likeliest only; 0 is off.
        top_p: then from the fewest likeliest that hold this probability; 1 is off.
        min_p: then from those at least this times as likely as the likeliest; 0 is off.
        seed: the same seed gives the same tokens, on any machine.
        sequence: the number of the first prompt's draws; those of the others count on from there.
        stop_tokens: ids that end a generation, besides the model's ``get_eos_ids``.
        prefill_chunk: tokens of each prompt per forward; None is as many as the model takes.
        on_token: called with a prompt's index and each token as it is chosen; what it raises ends
            the batch and is raised from here.
        on_end: the same with all tokens of a prompt as soon as it has ended.

    Raises:
        ValueError: no prompt, an integer out of its range, or a prompt that does not fit; nothing
            has run then.
        CudaInt4Error: temperature, top_p or min_p is out of its range; the model failed, or gave
            NaN.
        BatchInterrupted: Ctrl-C; it carries the tokens up to then.
    """
    _check_ints(0, max_new_tokens, prefill_chunk, top_k, seed, sequence)
    info = decode_info(model)
    arrays = [_int64_array("prompts", prompt) for prompt in prompts]
    _check_prompts(arrays, info)
    stops = _int64_array("stop_tokens", stop_tokens)
    ends = frozenset((*stops, *info.eos_ids))
    tokens: list[list[int]] = [[] for _ in prompts]
    interrupts = _Interrupts()
    raised: list[BaseException] = []  # a C callback cannot raise: keep it until the call is over

    def take(index: int, token: int) -> None:
        chosen = tokens[index]
        chosen.append(token)
        if on_token is not None:
            on_token(index, token)
        # The newest token has not been through the model: it may be one behind the context.
        is_full = len(arrays[index]) + len(chosen) > info.max_context_len
        if on_end is not None and (token in ends or len(chosen) == max_new_tokens or is_full):
            on_end(index, chosen)

    def callback(index: int) -> Callable[[int, Any], int]:
        def call(token: int, _user: Any) -> int:
            try:
                if not raised:
                    take(index, token)
            except BaseException as error:
                raised.append(error)
            return int(bool(raised) or interrupts.seen)

        return call

    requests = (_native.GenerateRequest * len(prompts))()
    on_prefill = _native.PrefillCallback(lambda _n, _user: int(bool(raised) or interrupts.seen))
    for index, (request, ids) in enumerate(zip(requests, arrays, strict=True)):
        request.prompt = (ctypes.c_int64 * len(ids)).from_buffer(ids)
        request.n_prompt = len(ids)
        request.config = _native.GenerateConfig(
            max_new_tokens=max_new_tokens or 0,
            prefill_chunk=prefill_chunk or 0,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            sequence=(sequence + index) % 2**64,
            stop_tokens=(ctypes.c_int64 * len(stops)).from_buffer(stops),
            n_stop_tokens=len(stops),
            on_prefill=on_prefill,
        )
        request.callback = _native.TokenCallback(callback(index))
    total = _native.GenerateStats()
    with interrupts, model.generating() as handle:
        code = _native.library().generate_several(
            handle, requests, len(requests), _native.byref(total)
        )
    all_stats = [GenerationStats.from_native(request.stats) for request in requests]
    generations = [Generation(*pair) for pair in zip(tokens, all_stats, strict=True)]
    n_at_once = min(len(prompts), info.max_sequences)
    batch = BatchGeneration(generations, _batch_stats(total, all_stats, n_at_once))
    if interrupts.seen or (raised and isinstance(raised[0], KeyboardInterrupt)):
        raise BatchInterrupted(batch) from (raised[0] if raised else None)
    if raised:
        raise raised[0]
    _native.check(code)
    return batch


def _check_prompts(prompts: Sequence[Sequence[int]], info: DecodeInfo) -> None:
    """Refuse what does not fit, and say which, before anything runs.

    Raises:
        ValueError: no prompt, an empty one, one longer than the context, a token that is none.
    """
    if not prompts:
        raise ValueError("generate: expected at least one prompt, got none")
    for number, prompt in enumerate(prompts, 1):
        who = f"generate: prompt {number} of {len(prompts)}"
        if not prompt:
            raise ValueError(f"{who}: expected at least one token, got none; leave it out")
        if len(prompt) > info.max_context_len:
            raise ValueError(
                f"{who}: has {len(prompt)} tokens, the context holds {info.max_context_len}; "
                "shorten it, or export with a longer context"
            )
        for token in prompt:
            if not 0 <= token < info.vocab_size:
                raise ValueError(
                    f"{who}: expected tokens in 0..{info.vocab_size - 1}, got {token}; is this the "
                    "model's tokenizer?"
                )


def _batch_stats(
    total: _native.GenerateStats, each: Sequence[GenerationStats], n_at_once: int
) -> BatchStats:
    rates = [stats.decode_tokens_per_s for stats in each if stats.new_tokens > 1]
    return BatchStats(
        n_prompts=len(each),
        n_at_once=n_at_once,
        prompt_tokens=total.prompt_tokens,
        new_tokens=total.new_tokens,
        load_s=total.load_s,
        prefill_s=total.prefill_s,
        decode_s=total.decode_s,
        prefill_tokens_per_s=_rate(total.prompt_tokens, total.prefill_s),
        decode_tokens_per_s=_rate(total.new_tokens - total.n_sequences, total.decode_s),
        decode_tokens_per_s_each=sum(rates) / len(rates) if rates else 0.0,
        peak_memory_bytes=total.peak_memory_bytes,
        peak_device_memory_bytes=total.peak_device_memory_bytes,
    )


def generate_text_batch(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    on_text: Callable[[int, str], Any] | None = None,
    bos: bool = True,
    stop_tokens: Sequence[int] = (),
    **options: Any,
) -> BatchGeneration:
    """Continue each of ``prompts``.

    Args:
        model: from ``cuda_int4.load``.
        tokenizer: from ``load_tokenizer``.
        prompts: texts, at least one token long each.
        on_text: called with a prompt's index and the text that continues it, as soon as that is
            whole.
        bos: put the begin token in front: the tokenizer's; for bytes the model's ``get_bos_id``.
        stop_tokens: besides the model's and the tokenizer's own end tokens.
        **options: as for ``generate_token_batch``.

    Raises:
        BatchInterrupted: Ctrl-C; it carries tokens and texts up to then.
    """
    info = decode_info(model)
    stops = sorted({*stop_tokens, *tokenizer.stop_tokens, *info.eos_ids})
    encoded_prompts = [encoded(tokenizer, prompt, info, bos=bos) for prompt in prompts]
    on_end = options.pop("on_end", None)

    def text_of(tokens: Sequence[int]) -> str:
        stream = TextStream(tokenizer)
        for token in tokens:
            if token not in stops:
                stream.push(token)
        return stream.finish()

    def end(index: int, tokens: list[int]) -> None:
        if on_end is not None:
            on_end(index, tokens)
        if on_text is not None:
            on_text(index, text_of(tokens))

    def with_texts(batch: BatchGeneration) -> BatchGeneration:
        texts = [replace(g, text=text_of(g.tokens)) for g in batch.generations]
        return BatchGeneration(texts, batch.stats)

    options = {**options, "stop_tokens": stops, "on_end": end}
    try:
        return with_texts(generate_token_batch(model, encoded_prompts, **options))
    except BatchInterrupted as interrupted:
        raise BatchInterrupted(with_texts(interrupted.batch)) from None
