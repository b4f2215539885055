"""Several conversations with a loaded model, through cuda_int4_generate_several."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

from cuda_int4 import _native
from cuda_int4.generation import STOP_REASONS


@dataclass
class Conversation:
    """One request; ``config`` are fields of cuda_int4_generate_config."""

    prompt: list[int]
    config: dict[str, Any] = field(default_factory=dict)
    start_pos: int = 0
    stop_tokens: list[int] = field(default_factory=list)
    ends_after: int = 10**9  # tokens, by its callback
    ends_in_prefill: bool = False
    # what came of it
    tokens: list[int] = field(default_factory=list)
    read: list[int] = field(default_factory=list)
    stats: _native.GenerateStats | None = None

    @property
    def stop_reason(self) -> str:
        assert self.stats is not None
        return STOP_REASONS[self.stats.stop_reason]


def generate(model: Any, conversations: list[Conversation]) -> _native.GenerateStats:
    """All of them together; the total."""
    requests = (_native.GenerateRequest * max(1, len(conversations)))()
    kept: list[Any] = []
    for request, one in zip(requests, conversations, strict=False):

        def on_token(token: int, _user: Any, one: Conversation = one) -> int:
            one.tokens.append(token)
            return int(len(one.tokens) >= one.ends_after)

        def on_prefill(n_read: int, _user: Any, one: Conversation = one) -> int:
            one.read.append(n_read)
            return int(one.ends_in_prefill)

        prompt = (ctypes.c_int64 * len(one.prompt))(*one.prompt)
        stops = (ctypes.c_int64 * len(one.stop_tokens))(*one.stop_tokens)
        request.prompt, request.n_prompt, request.start_pos = prompt, len(prompt), one.start_pos
        request.config = _native.GenerateConfig(
            **{"top_p": 1.0, "max_new_tokens": 12, **one.config}
        )
        request.config.stop_tokens, request.config.n_stop_tokens = stops, len(stops)
        request.config.on_prefill = _native.PrefillCallback(on_prefill)
        request.callback = _native.TokenCallback(on_token)
        kept += [prompt, stops, request.callback, request.config.on_prefill]
    total = _native.GenerateStats()
    code = _native.library().generate_several(
        model.handle, requests, len(conversations), _native.byref(total)
    )
    for request, one in zip(requests, conversations, strict=False):
        one.stats = _native.GenerateStats.from_buffer_copy(bytes(request.stats))
    _native.check(code)
    return total
