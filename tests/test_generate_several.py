"""Several conversations at once (cuda_int4_generate_several): each gets what it would get alone.

The models choose every token by a hash of the conversation so far: a token of another row, or a
padded one that counts, changes all that follow.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import cuda_int4
from conversations import Conversation, generate
from cuda_int4 import _native
from cuda_int4.generation import STOP_REASONS
from language_models import HistoryModel, export_delegated, export_plain, export_rows, greedy

N_ROWS = 4
CONTEXT = 64
PROMPTS = [[5], list(range(1, 20)), [9, 8, 7], [200] * 11, [3, 1], list(range(100, 133))]


def expected(prompt: list[int], n: int) -> list[int]:
    return greedy(HistoryModel(), prompt, n)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("several")


def load_with_steps(path: Path) -> Any:
    """On the CPU, and yet decoded in the steps that a GPU takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_INT4_DEVICE_LOOP", "cpu")
        return cuda_int4.load(path, device="cpu")


@pytest.fixture(scope="module", params=["host", "steps"])
def rows(request, folder) -> Any:
    if request.param == "host":
        return cuda_int4.load(export_rows(folder / "rows.pte", N_ROWS))
    return load_with_steps(export_delegated(folder / "rows_steps.pte", n_rows=N_ROWS))


@pytest.fixture(scope="module", params=["host", "steps"])
def alone(request, folder) -> Any:
    if request.param == "host":
        return cuda_int4.load(export_plain(HistoryModel(), folder / "alone.pte"))
    return load_with_steps(export_delegated(folder / "alone_steps.pte"))


def test_the_model_says_how_many_it_takes(rows, alone):
    for model, n in ((rows, N_ROWS), (alone, 1)):
        info = _native.DecodeInfo()
        _native.check(_native.library().model_decode_info(model.handle, _native.byref(info)))
        assert (info.max_sequences, info.max_seq_len, info.vocab_size) == (n, 16, 256)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 6])
@pytest.mark.parametrize("chunk", [0, 1, 5])
def test_ragged_prompts_give_the_tokens_of_each_alone(rows, n, chunk):
    several = [Conversation(p, {"prefill_chunk": chunk}) for p in PROMPTS[:n]]
    total = generate(rows, several)
    for one in several:
        assert one.tokens == expected(one.prompt, 12)
        assert one.stop_reason == "max_new_tokens"
        assert one.read[-1] == len(one.prompt) and one.stats.n_sequences == 1
    assert total.n_sequences == n and total.new_tokens == 12 * n
    assert total.prompt_tokens == sum(map(len, PROMPTS[:n]))


def test_logits_of_the_last_token_only(folder):
    model = cuda_int4.load(export_rows(folder / "last.pte", 3, last_only=True))
    several = [Conversation(p) for p in PROMPTS[:3]]
    generate(model, several)
    assert [one.tokens for one in several] == [expected(p, 12) for p in PROMPTS[:3]]


def test_a_model_of_one_runs_them_one_after_the_other(alone):
    several = [Conversation(p) for p in PROMPTS]
    total = generate(alone, several)
    assert [one.tokens for one in several] == [expected(p, 12) for p in PROMPTS]
    assert total.new_tokens == 12 * len(PROMPTS)
    assert total.time_to_first_token_s == several[0].stats.time_to_first_token_s
    firsts = [one.stats.time_to_first_token_s for one in several]
    assert firsts == sorted(firsts)


def test_each_ends_in_its_own_way(rows):
    long = expected(PROMPTS[2], 40)
    several = [
        Conversation(PROMPTS[0], {"max_new_tokens": 1}),
        Conversation(PROMPTS[1], {"max_new_tokens": 0}),  # to the end of the context
        Conversation(PROMPTS[2], {"max_new_tokens": 40}, stop_tokens=[long[20]]),
        Conversation(PROMPTS[3], {"max_new_tokens": 40}, ends_after=7),
    ]
    total = generate(rows, several)
    n_stop = long.index(long[20]) + 1
    n_context = CONTEXT - len(PROMPTS[1]) + 1
    assert [len(one.tokens) for one in several] == [1, n_context, n_stop, 7]
    assert [one.stop_reason for one in several] == [
        "max_new_tokens", "end_of_context", "stop_token", "interrupted",
    ]  # fmt: skip
    for one in several:
        assert one.tokens == expected(one.prompt, len(one.tokens))
        assert one.stats.new_tokens == len(one.tokens)
    assert STOP_REASONS[total.stop_reason] == "end_of_context"  # the last to end


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]])
def test_rows_that_end_at_any_time_leave_the_others_alone(rows, order):
    lengths = [1, 5, 17, 30]
    several = [Conversation(PROMPTS[i], {"max_new_tokens": lengths[order[i]]}) for i in range(4)]
    generate(rows, several)
    for i, one in enumerate(several):
        assert one.tokens == expected(one.prompt, lengths[order[i]])


def test_one_that_is_ended_in_prefill_leaves_the_others_alone(rows):
    several = [Conversation(p, {"prefill_chunk": 4}) for p in PROMPTS[:4]]
    several[1].ends_in_prefill = True
    generate(rows, several)
    assert several[1].tokens == [] and several[1].read == [4]
    assert several[1].stop_reason == "interrupted" and several[1].stats.prompt_tokens == 4
    for i in (0, 2, 3):
        assert several[i].tokens == expected(PROMPTS[i], 12)


def test_all_ended_in_prefill(rows):
    several = [Conversation(p, {"prefill_chunk": 4}, ends_in_prefill=True) for p in PROMPTS[:3]]
    total = generate(rows, several)
    assert [one.stats.prompt_tokens for one in several] == [1, 4, 3]
    assert total.n_sequences == total.new_tokens == 0 and total.time_to_first_token_s == 0


def test_draws_are_those_of_each_alone(rows, alone):
    config = {"temperature": 1.3, "top_k": 50, "top_p": 0.9, "min_p": 0.001, "seed": 5}
    several = [Conversation(p, {**config, "sequence": i}) for i, p in enumerate(PROMPTS[:4])]
    several[2].config["seed"] = 6
    generate(rows, several)
    for one in several:
        single = Conversation(one.prompt, one.config)
        generate(alone, [single])
        assert one.tokens == single.tokens != expected(one.prompt, 12)
    same = [Conversation([7], {**config, "sequence": i}) for i in (0, 0, 1)]
    generate(rows, same)
    assert same[0].tokens == same[1].tokens != same[2].tokens


def test_conversations_go_on_in_their_rows(rows):
    several = [Conversation(p) for p in PROMPTS[:4]]
    generate(rows, several)
    rest = [
        Conversation(one.tokens[-1:], {"max_new_tokens": 6}, start_pos=len(one.prompt) + 11)
        for one in several
    ]
    generate(rows, rest)
    for one, more in zip(several, rest, strict=True):
        assert one.tokens + more.tokens == expected(one.prompt, 18)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": []}, "at least one token, got none"),
        ({"prompt": [1] * 65}, "prompt has 65 tokens, the context holds 64"),
        ({"prompt": [256]}, "prompt tokens in 0..255, got 256"),
        ({"start_pos": 3}, "start_pos 0 of all conversations, or of none, got 3 of number 1"),
        ({"config": {"temperature": -1.0}}, "temperature: expected"),
        ({"config": {"min_p": 2.0}}, "min_p: expected"),
    ],
)
def test_what_is_wrong_with_one_is_refused_before_any_runs(rows, change, reason):
    several = [Conversation(PROMPTS[0]), Conversation(**{"prompt": PROMPTS[1], **change})]
    with pytest.raises(_native.CudaInt4Error, match=reason):
        generate(rows, several)
    assert several[0].read == [] and several[0].tokens == []


def test_more_than_there_are_rows_cannot_go_on(rows):
    several = [Conversation([1], start_pos=3) for _ in range(N_ROWS + 1)]
    with pytest.raises(_native.CudaInt4Error, match="expected a row below 4, got 4"):
        generate(rows, several)


def test_logits_of_one_that_no_token_can_be_chosen_from_are_an_error(folder):
    class Breaks(HistoryModel):
        def __init__(self) -> None:
            super().__init__()
            self.table[:, 3] = math.nan
            self.table[:128, 3] = 0.0

    path = export_delegated(folder / "breaks.pte", Breaks())
    outcomes = []
    for model in (cuda_int4.load(path, device="cpu"), load_with_steps(path)):
        several = [Conversation([i], {"max_new_tokens": 40}) for i in range(8)]
        reason = "gave NaN as the logit of token 3 at position"
        with pytest.raises(_native.CudaInt4Error, match=reason) as caught:
            generate(model, several)
        outcomes.append((str(caught.value), [one.tokens for one in several]))
    assert outcomes[0] == outcomes[1]


def test_an_error_of_a_step_comes_behind_the_tokens_ahead_of_it(folder):
    path = export_delegated(folder / "longer.pte", get_max_context_len=80)  # its cache holds 64
    for model in (cuda_int4.load(path, device="cpu"), load_with_steps(path)):
        for _turn in range(2):
            one = Conversation([9], {"max_new_tokens": 0})
            with pytest.raises(_native.CudaInt4Error, match="index_put_ refused"):
                generate(model, [one])
            assert one.tokens == expected([9], 64)


class Counts(HistoryModel):
    """Its state is how often it was called, too: a step too many would change the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, tokens: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return super().forward(tokens, input_pos) * torch.cos(self.calls)


@pytest.mark.parametrize("ends_after", [1, 2, 3, 10])
def test_steps_that_are_not_wanted_change_nothing(folder, ends_after):
    counts, history = folder / "counts.pte", folder / "wanted.pte"
    if not counts.exists():
        export_delegated(counts, Counts())
        export_delegated(history)
    for path in (counts, history):
        outcomes = []
        for model in (cuda_int4.load(path, device="cpu"), load_with_steps(path)):
            first = Conversation([7, 8], {"max_new_tokens": 30}, ends_after=ends_after)
            generate(model, [first])
            rest = Conversation(first.tokens[-1:], start_pos=1 + ends_after)
            generate(model, [rest])
            outcomes.append(first.tokens + rest.tokens)
        assert outcomes[0] == outcomes[1]
        if path == history:
            assert outcomes[0] == expected([7, 8], ends_after + 12)


def test_times_add_up(rows):
    several = [Conversation(p) for p in PROMPTS]
    total = generate(rows, several)
    assert 0 < several[0].stats.prefill_s <= several[0].stats.time_to_first_token_s
    assert total.prefill_s >= several[0].stats.prefill_s
    assert total.decode_s >= max(one.stats.decode_s for one in several[:4])
    assert torch.isfinite(torch.tensor([total.prefill_s, total.decode_s])).all()
