"""The decode loop, through the program cuda-int4-decode: what it prints, when it ends, its errors.

Most of it decodes from HistoryModel, whose every token depends on all those before it.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from cuda_int4 import _native
from language_models import (
    HistoryModel,
    ToyLlama,
    export_plain,
    export_rows,
    export_toy_llama,
    greedy,
    toy_llama,
)

PROGRAM = _native.package_dir() / "bin" / "cuda-int4-decode"
PROMPT = list(b"def f(x)")
TIMEOUT_S = 60


def run(*args: object, check: int | None = 0, **options) -> subprocess.CompletedProcess:
    """Run the program; ``check`` is the exit code that is expected, None any."""
    command = [str(PROGRAM), *map(str, args)]
    done = subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, **options)
    assert check is None or done.returncode == check, (done.returncode, done.stderr.decode())
    return done


def run_json(*args: object) -> dict:
    """Run the program with --json; stdout is one object and nothing else."""
    return json.loads(run(*args, "--json").stdout)


def ids(tokens: list[int]) -> str:
    return ",".join(map(str, tokens))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("decode")


@pytest.fixture(scope="module")
def history(folder) -> Path:
    return export_plain(HistoryModel(), folder / "history.pte")


@pytest.fixture(scope="module")
def llama(folder) -> Path:
    return export_toy_llama(folder / "llama.pte")


# ---- tokens ----


@pytest.mark.parametrize("chunk", [1, 3, 8, 16, 1000, None])
def test_greedy_tokens_are_those_of_eager_in_prefill_chunks_of_any_size(history, chunk):
    options = [] if chunk is None else ["--prefill-chunk", chunk]
    result = run_json(history, "--tokens", ids(PROMPT), "--max-new", 20, *options)
    assert result["tokens"] == greedy(HistoryModel(), PROMPT, 20)


@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_an_int4_llama_in_one_delegate_decodes_as_eager_does(llama, chunk):
    result = run_json(llama, "--tokens", ids(PROMPT), "--max-new", 40, "--prefill-chunk", chunk)
    assert result["tokens"] == greedy(toy_llama(), PROMPT, 40)


@pytest.mark.parametrize(
    ("name", "model", "options"),
    [
        ("last", {"last_only": True}, {}),
        ("start", {"start_only": True}, {}),
        ("half", {"dtype": torch.float16}, {}),
        ("bfloat", {"dtype": torch.bfloat16}, {}),
        ("one_by_one", {}, {"max_seq_len": 1, "enable_dynamic_shape": False}),
    ],
)
def test_every_form_of_signature_gives_the_same_tokens(folder, name, model, options):
    path = export_plain(HistoryModel(**model), folder / f"{name}.pte", **options)
    result = run_json(path, "--tokens", ids(PROMPT), "--max-new", 12)
    model.pop("start_only", None)
    assert result["tokens"] == greedy(HistoryModel(**model), PROMPT, 12)


def test_a_seed_is_a_conversation_and_sampling_leaves_the_greedy_path(history):
    options = ["--tokens", ids(PROMPT), "--max-new", 20, "--temperature", 1.5]
    first = run_json(history, *options, "--seed", 3)["tokens"]
    assert first == run_json(history, *options, "--seed", 3, "--prefill-chunk", 2)["tokens"]
    assert first != run_json(history, *options, "--seed", 4)["tokens"]
    assert run_json(history, *options, "--top-k", 1)["tokens"] == greedy(HistoryModel(), PROMPT, 20)


def test_a_sequence_has_draws_of_its_own_and_min_p_filters_them(history):
    options = ["--tokens", ids(PROMPT), "--max-new", 20, "--temperature", 1.5]
    first = run_json(history, *options, "--sequence", 1)["tokens"]
    assert first == run_json(history, *options, "--sequence", 1)["tokens"]
    assert first != run_json(history, *options)["tokens"]
    assert run_json(history, *options, "--min-p", 1)["tokens"] == greedy(HistoryModel(), PROMPT, 20)


@pytest.mark.parametrize("kind", ["one row", "rows"])
def test_several_prompts(folder, history, kind):
    path = history if kind == "one row" else export_rows(folder / "rows.pte", 3)
    prompts = [[1], PROMPT, [7, 7, 7], [200, 3]]
    lists = folder / "lists.txt"
    lists.write_text("".join(f"{ids(prompt)}\n" for prompt in prompts))
    result = run_json(path, "--token-lists", lists, "--max-new", 9)
    expected = [greedy(HistoryModel(), prompt, 9) for prompt in prompts]
    assert [one["tokens"] for one in result["sequences"]] == expected
    assert result["total"]["n_sequences"] == 4 and result["total"]["new_tokens"] == 36
    assert result["total"]["prompt_tokens"] == sum(map(len, prompts))
    done = run(path, "--token-lists", lists, "--max-new", 9)
    lines = [f"[{i + 1}] {' '.join(map(str, tokens))}" for i, tokens in enumerate(expected)]
    assert done.stdout.decode() == "\n".join(lines) + "\n"
    assert b"decoded 36 tokens" in done.stderr and b"in 4 sequences" in done.stderr


def test_several_texts_draw_apart(folder, history):
    texts = folder / "texts.txt"
    texts.write_bytes(b"def f(x)\r\ndef f(x)\nimport")
    options = ["--max-new", 8, "--temperature", 1, "--seed", 4]
    result = run_json(history, "--prompts", texts, *options)["sequences"]
    assert [one["prompt_tokens"] for one in result] == [8, 8, 6]
    for i, prompt in enumerate(["def f(x)", "def f(x)", "import"]):
        alone = run_json(history, "--prompt", prompt, *options, "--sequence", i)
        assert result[i]["tokens"] == alone["tokens"] and result[i]["text"] == alone["text"]
    assert result[0]["tokens"] != result[1]["tokens"]


def test_threads_do_not_change_the_tokens(llama):
    one = run_json(llama, "--tokens", ids(PROMPT), "--threads", 1)
    assert one["tokens"] == run_json(llama, "--tokens", ids(PROMPT), "--threads", 3)["tokens"]


# ---- how it ends ----


def test_max_new_tokens_ends_it(history):
    result = run_json(history, "--tokens", ids(PROMPT), "--max-new", 1)
    assert (result["stop_reason"], result["new_tokens"], len(result["tokens"])) == (
        "max_new_tokens", 1, 1,
    )  # fmt: skip


def test_stop_tokens_end_it_whether_given_or_the_models_own(history, folder):
    chosen = greedy(HistoryModel(), PROMPT, 20)
    n = next(i for i in range(5, 20) if chosen[i] not in chosen[:i])
    result = run_json(
        history, "--tokens", ids(PROMPT), "--stop-token", 999, "--stop-token", chosen[n]
    )
    assert (result["stop_reason"], result["tokens"]) == ("stop_token", chosen[: n + 1])
    path = export_plain(HistoryModel(), folder / "eos.pte", get_eos_ids=[999, chosen[n]])
    result = run_json(path, "--tokens", ids(PROMPT))
    assert (result["stop_reason"], result["tokens"]) == ("stop_token", chosen[: n + 1])


def test_the_end_of_the_context_ends_it(history):
    result = run_json(history, "--tokens", ids(PROMPT))
    assert result["stop_reason"] == "end_of_context"
    assert result["new_tokens"] == 64 - len(PROMPT) + 1  # the last one chosen is not in the cache
    assert result["tokens"] == greedy(HistoryModel(), PROMPT, result["new_tokens"])


def test_a_prompt_may_fill_the_context_and_no_more(history):
    result = run_json(history, "--tokens", ids([7] * 64))
    assert (result["prompt_tokens"], result["new_tokens"]) == (64, 1)
    error = run(history, "--tokens", ids([7] * 65), check=1).stderr.decode()
    assert "the prompt has 65 tokens, the context holds 64" in error
    assert "shorten the prompt" in error


# ---- output ----


def test_text_goes_to_stdout_as_bytes_and_times_to_stderr(history):
    done = run(history, "--prompt", "def f(x)", "--max-new", 20)
    assert done.stdout == bytes(greedy(HistoryModel(), PROMPT, 20)) + b"\n"
    lines = done.stderr.decode().splitlines()
    assert [line.split()[0] for line in lines] == ["load", "prompt", "decoded"], lines
    assert "decoded 20 tokens" in lines[2] and "ended by max_new_tokens" in lines[2]


def test_ids_are_printed_for_ids_and_on_request(history, folder):
    expected = " ".join(map(str, greedy(HistoryModel(), PROMPT, 5))).encode() + b"\n"
    assert run(history, "--tokens", ids(PROMPT), "--max-new", 5).stdout == expected
    text = folder / "prompt.txt"
    text.write_bytes(bytes(PROMPT))
    options = ["--max-new", 5, "--print-tokens"]
    assert run(history, "--prompt", "def f(x)", *options).stdout == expected
    assert run(history, "--prompt-file", text, *options).stdout == expected
    from_stdin = run(history, "--prompt-file", "-", *options, input=bytes(PROMPT))
    assert from_stdin.stdout == expected


def test_json_is_one_object_with_everything(history):
    result = run_json(history, "--prompt", "def f(x)")
    assert set(result) == {
        "tokens", "text", "stop_reason", "prompt_tokens", "new_tokens", "load_s", "prefill_s",
        "decode_s", "time_to_first_token_s", "prefill_tokens_per_s", "decode_tokens_per_s",
        "peak_memory_bytes", "peak_device_memory_bytes",
    }  # fmt: skip
    assert result["prompt_tokens"] == 8 and result["new_tokens"] == len(result["tokens"]) == 57
    assert 0 < result["prefill_s"] <= result["time_to_first_token_s"] < TIMEOUT_S
    assert 0 < result["load_s"] < TIMEOUT_S and 0 < result["decode_s"] < TIMEOUT_S
    rate = (result["new_tokens"] - 1) / result["decode_s"]
    assert result["decode_tokens_per_s"] == pytest.approx(rate, rel=1e-2)
    assert 2**20 < result["peak_memory_bytes"] < 2**32
    assert set(result["text"]) & {"\N{REPLACEMENT CHARACTER}"}  # random bytes are no UTF-8
    assert "text" not in run_json(history, "--tokens", "1")


def test_the_begin_token_goes_in_front_of_a_text(folder):
    path = export_plain(HistoryModel(), folder / "bos.pte", get_bos_id=3)
    result = run_json(path, "--prompt", "def f(x)", "--max-new", 5)
    assert result["tokens"] == greedy(HistoryModel(), [3, *PROMPT], 5)
    result = run_json(path, "--prompt", "def f(x)", "--max-new", 5, "--no-bos")
    assert result["tokens"] == greedy(HistoryModel(), PROMPT, 5)
    result = run_json(path, "--tokens", ids(PROMPT), "--max-new", 5)
    assert result["tokens"] == greedy(HistoryModel(), PROMPT, 5)


def test_tokens_come_as_they_are_chosen(endless):
    process = start(endless, "--tokens", "1")
    try:
        first = process.stdout.read(1)  # would block until the end if it were not streamed
        assert first.isdigit() and process.poll() is None
    finally:
        process.kill()
        process.communicate()


# ---- Ctrl-C ----


@pytest.fixture(scope="module")
def endless(folder) -> Path:
    """Minutes of decoding: each token looks at a cache of a million."""
    return export_plain(HistoryModel(context=1_000_000), folder / "endless.pte", max_seq_len=2)


def start(*args: object) -> subprocess.Popen:
    command = [str(PROGRAM), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def interrupt(process: subprocess.Popen) -> tuple[bytes, str]:
    """SIGINT; stdout and stderr from then on."""
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=TIMEOUT_S)
    return stdout, stderr.decode()


def test_ctrl_c_finishes_the_token_prints_the_times_and_exits_with_130(endless):
    process = start(endless, "--tokens", "1,2")
    head = b"".join(process.stdout.read(1) for _ in range(12))
    tail, stderr = interrupt(process)
    assert process.returncode == 130
    tokens = (head + tail).decode()
    assert tokens.endswith("\n")
    n = len(tokens.split())
    assert n >= 3 and f"decoded {n} tokens" in stderr and "ended by interrupted" in stderr
    assert list(map(int, tokens.split()))[:3] == greedy(HistoryModel(context=1_000_000), [1, 2], 3)


def test_ctrl_c_ends_a_prefill(endless, folder):
    text = folder / "long.txt"
    text.write_bytes(b"x" * 500_000)
    process = start(endless, "--prompt-file", text)
    time.sleep(1.0)
    stdout, stderr = interrupt(process)
    assert (process.returncode, stdout) == (130, b"")
    assert "decoded 0 tokens" in stderr and "ended by interrupted" in stderr


def test_ctrl_c_with_json_still_gives_the_object(endless):
    process = start(endless, "--tokens", "1", "--json")
    time.sleep(1.0)
    stdout, _ = interrupt(process)
    assert process.returncode == 130
    assert json.loads(stdout)["stop_reason"] == "interrupted"


# ---- the command line ----


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ([], "expected the path of a .pte, got none"),
        (["m.pte"], "expected one of --prompt, --prompt-file, --tokens, --prompts and"),
        (["m.pte", "--prompts", "/dev/null"], "--prompts: expected a line for each prompt"),
        (["m.pte", "--prompts", "/nowhere/at/all"], "--prompts: /nowhere/at/all: No such file"),
        (["m.pte", "--token-lists", "/dev/null", "--prompt", "a"], "expected a line"),
        (["m.pte", "--prompt", "a", "--min-p", "2"], "min_p: expected 0 <= min_p <= 1"),
        (["m.pte", "n.pte", "--prompt", "a"], "expected one .pte, got 'n.pte' besides"),
        (["m.pte", "--prompt", "a", "--tokens", "1"], "got two"),
        (["m.pte", "--prompt", ""], "at least one byte"),
        (["m.pte", "--prompt-file", "/nowhere/at/all"], "/nowhere/at/all: No such file"),
        (["m.pte", "--tokens", "1,2,"], "--tokens: expected an integer >= 0, got ''"),
        (["m.pte", "--tokens", "1, 2"], "got ' 2'"),
        (["m.pte", "--tokens", "-1"], "got '-1'"),
        (["m.pte", "--tokens", "99999999999999999999"], "got '99999999999999999999'"),
        (["m.pte", "--prompt", "a", "--max-new", "0"], "--max-new: expected an integer >= 1"),
        (["m.pte", "--prompt", "a", "--max-new", "2x"], "got '2x'"),
        (["m.pte", "--prompt", "a", "--temperature", "hot"], "--temperature: expected a number"),
        (["m.pte", "--prompt", "a", "--temperature", "nan"], "--temperature: expected a number"),
        (["m.pte", "--prompt", "a", "--temperature", "-1"], "temperature: expected a finite"),
        (["m.pte", "--prompt", "a", "--top-p", "1.01"], "top_p: expected 0 < top_p <= 1"),
        (["m.pte", "--prompt", "a", "--top-k", "-3"], "--top-k: expected an integer >= 0"),
        (["m.pte", "--prompt", "a", "--threads", "0"], "--threads: expected an integer >= 1"),
        (
            ["m.pte", "--prompt", "a", "--device", "tpu"],
            "--device: expected auto, cpu, cuda or cuda:N",
        ),
        (["m.pte", "--prompt", "a", "--loud"], "unrecognized option '--loud'"),
        (["m.pte", "--prompt"], "option '--prompt' requires an argument"),
    ],
)
def test_a_wrong_command_line_exits_with_2_and_says_why(args, reason):
    done = run(*args, check=2)
    assert reason in done.stderr.decode()
    assert "--help" in done.stderr.decode() and done.stdout == b""


def test_help_and_version():
    text = run("--help").stdout.decode()
    assert text.startswith("usage: cuda-int4-decode MODEL.pte") and "examples" in text
    assert run("--version").stdout.decode().startswith("cuda-int4-decode ")


# ---- models it cannot drive ----


class Constant(nn.Module):
    """Gives ``output`` whatever comes in."""

    def __init__(self, output: torch.Tensor):
        super().__init__()
        self.register_buffer("output", output)

    def forward(self, tokens, *rest):
        return self.output * 1 + (tokens.sum() * 0).to(self.output.dtype)


INT64 = torch.zeros(1, 4, dtype=torch.int64), torch.arange(4)
LOGITS = torch.zeros(1, 4, 8)


@pytest.mark.parametrize(
    ("model", "inputs", "methods", "reason"),
    [
        (Constant(LOGITS), INT64[:1], {}, "expected forward(tokens, input_pos) -> logits, got 1"),
        (Constant(LOGITS), (torch.zeros(1, 4), INT64[1]), {}, "expected tokens [1, S] int64"),
        (Constant(LOGITS), (torch.zeros(2, 4, dtype=torch.int64), INT64[1]), {}, "a batch of one"),
        (
            Constant(LOGITS),
            (torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)),
            {},
            "or, like tokens, [B, S]",
        ),
        (
            Constant(LOGITS),
            (torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64)),
            {},
            "or a row for each of tokens",
        ),
        (
            Constant(LOGITS),
            INT64,
            {"get_max_batch": 2},
            "expected get_max_batch in 1..1",
        ),
        (Constant(LOGITS), (INT64[0], torch.arange(3)), {}, "expected input_pos [S] or [1] int64"),
        (Constant(LOGITS.long()), INT64, {}, "expected logits [1, S, V] or [1, V] in float16"),
        (Constant(LOGITS), INT64, {"use_kv_cache": False}, "use_kv_cache says false"),
        (Constant(LOGITS), INT64, {"enable_dynamic_shape": False}, "tokens must be [1, 1]"),
        (
            Constant(LOGITS),
            INT64,
            {"get_max_seq_len": None, "get_max_context_len": None},
            "the length of the context is not known",
        ),
        (Constant(LOGITS), INT64, {"get_vocab_size": 9}, "get_vocab_size in 1..8"),
        (Constant(LOGITS), INT64, {"get_bos_id": 8}, "expected get_bos_id in 0..7, got 8"),
        (Constant(LOGITS), INT64, {"get_max_seq_len": 1.5}, "get_max_seq_len: expected integers"),
    ],
)
def test_models_of_another_signature_are_refused_with_the_reason(
    tmp_path, model, inputs, methods, reason
):
    path = export_plain(model, tmp_path / "model.pte", inputs=inputs, **methods)
    done = run(path, "--tokens", "1", check=1)
    assert reason in done.stderr.decode() and done.stdout == b""


def test_nan_logits_are_an_error_and_never_a_token(folder):
    model = HistoryModel()
    model.table[:, 17] = torch.nan
    path = export_plain(model, folder / "nan.pte")
    done = run(path, "--tokens", "1,2,3", check=1)
    assert "gave NaN as the logit of token 17 at position 3" in done.stderr.decode()
    assert done.stdout == b""


def test_tokens_outside_of_the_vocabulary_are_refused(history):
    error = run(history, "--tokens", "1,2,256", check=1).stderr.decode()
    assert "expected prompt tokens in 0..255, got 256 at index 2" in error


def test_text_for_a_model_that_does_not_speak_bytes_is_refused(folder):
    path = export_plain(HistoryModel(vocab_size=600), folder / "big.pte")
    error = run(path, "--prompt", "a", check=1).stderr.decode()
    assert "expected a model whose tokens are bytes, got one of 600 tokens" in error
    assert "--tokenizer" in error


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "garbage"])
def test_a_file_that_is_no_program_exits_with_1_and_the_reason(history, tmp_path, damage):
    path = tmp_path / "model.pte"
    data = history.read_bytes()
    if damage != "missing":
        path.write_bytes(
            {"empty": b"", "truncated": data[: len(data) // 2], "garbage": b"\x5a" * 4096}[damage]
        )
    done = run(path, "--tokens", "1", check=1)
    assert done.stderr.decode().startswith("cuda-int4-decode: ") and len(done.stderr) > 40


# ---- memory ----


def test_decoding_does_not_grow_memory(llama):
    """The small form of ``python tests/soak_decode.py --tokens 100000``."""
    script = Path(__file__).with_name("soak_decode.py")
    command = [sys.executable, str(script), "--tokens", "4000", "--model", str(llama)]
    done = subprocess.run(command, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()


@pytest.mark.parametrize("options", [[], ["--temperature", "1", "--top-k", "40", "--top-p", "0.9"]])
def test_a_token_allocates_nothing(llama, tmp_path, options):
    """As many allocations for 40 new tokens as for 10, whatever the rest of a run needs."""
    source = Path(__file__).parent / "cpp" / "count_allocations.cpp"
    counter = tmp_path / "count_allocations.so"
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, "-shared", "-fPIC", "-O1", str(source), "-o", str(counter), "-ldl"]
    subprocess.run(command, check=True)

    def count(max_new: int) -> int:
        file = tmp_path / "count.txt"
        environment = {**os.environ, "LD_PRELOAD": str(counter), "COUNT_ALLOCATIONS": str(file)}
        arguments = ["--tokens", ids(PROMPT), "--max-new", max_new, "--threads", 1, *options]
        run(llama, *arguments, env=environment)
        return int(file.read_text())

    assert count(10) > 100  # the counter counts
    assert count(40) == count(10)


def test_the_toy_has_no_tie_that_would_make_greedy_a_matter_of_luck():
    """The comparisons with eager above hold for any correct kernel, not for one rounding."""
    model, tokens = toy_llama(), [*PROMPT]
    tokens += greedy(toy_llama(), PROMPT, 40)
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), torch.arange(len(tokens)))[0]
    first, second = logits.topk(2).values.unbind(-1)
    assert (first - second).min() > 1e-3, ToyLlama.__doc__
