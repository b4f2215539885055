"""Generation from Python: streaming text, ``cuda-int4 run``, and the same .pte in TextLLMRunner."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cuda_int4
from cuda_int4 import _native, cli
from cuda_int4.generation import GenerationInterrupted, decode_info, generate_text, generate_tokens
from cuda_int4.text_stream import ByteTokenizer, FileTokenizer, TextStream, load_tokenizer
from language_models import HistoryModel, export_plain, export_toy_llama, greedy, toy_llama

FFFD = "\N{REPLACEMENT CHARACTER}"
TIMEOUT_S = 120
PROMPT = "def f(x)"


# ---- text out of tokens ----


class PieceTokenizer:
    """Token = index into a list of byte strings; a word's space shows only behind another word."""

    stop_tokens = (0,)

    def __init__(self, *pieces: bytes):
        self.pieces = pieces
        self.n_words = len(pieces)

    def encode(self, text, *, bos=True):
        raise NotImplementedError

    def decode(self, tokens):
        return b"".join(self.pieces[t] for t in tokens).decode("utf-8", "replace").removeprefix(" ")


def stream(tokenizer, tokens) -> tuple[list[str], str]:
    """The pieces that come with each token and at the end, and the whole."""
    pieces: list[str] = []
    text_stream = TextStream(tokenizer, pieces.append)
    for token in tokens:
        text_stream.push(token)
    text = text_stream.finish()
    assert "".join(pieces) == text
    return pieces, text


@pytest.mark.parametrize("text", ["abc", "é", "a€b", "👩‍🚀 fährt", "日本語", "\0\x7f"])
def test_bytes_stream_in_whole_characters(text):
    pieces, whole = stream(ByteTokenizer(), text.encode())
    assert pieces == list(text) and whole == text


def test_bytes_that_are_no_utf8_become_replacement_characters():
    assert stream(ByteTokenizer(), b"a\xffb") == (["a", FFFD, "b"], f"a{FFFD}b")
    assert stream(ByteTokenizer(), b"a\xe2\x82") == (["a", FFFD], f"a{FFFD}")  # cut at the end
    assert stream(ByteTokenizer(), [97, 300, 98]) == (["a", "b"], "ab")  # a special token


def test_a_character_of_several_tokens_is_held_back_until_it_is_whole():
    tokenizer = PieceTokenizer(b"", b"a\xf0\x9f", b"\x91", b"\xa9b", b"c")
    text_stream = TextStream(tokenizer)
    pieces = []
    for token in (4, 1, 2, 3, 4):
        text_stream.push(token)
        pieces.append("".join(text_stream._pieces))
    assert pieces == ["c", "c", "c", "ca👩b", "ca👩bc"]


def test_words_keep_their_spaces():
    tokenizer = PieceTokenizer(b"", b" hello", b" world", b"!")
    assert stream(tokenizer, [1, 2, 0, 2, 3]) == (
        ["hello", " world", " world", "!"],
        "hello world world!",
    )


def test_what_never_becomes_a_character_is_given_out_in_the_end():
    tokenizer = PieceTokenizer(b"", b"\xff", b"a")
    assert stream(tokenizer, [2, 1])[1] == f"a{FFFD}"
    pieces, text = stream(tokenizer, [1] * 100 + [2])
    assert text == FFFD * 100 + "a"
    assert max(map(len, pieces)) <= TextStream.MAX_HELD_TOKENS  # bounded work per token


# ---- tokenizer files ----


def byte_characters() -> dict[int, str]:
    """The printable stand-ins of GPT-2's byte-level vocabularies."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def write_ascii_tokenizer(path: Path) -> Path:
    """A tokenizer.json of 128 tokens, token = byte: what TextLLMRunner reads too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    characters = byte_characters()
    tokenizer = Tokenizer(models.BPE(vocab={characters[b]: b for b in range(128)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path))
    return path


def write_sentencepiece(path: Path) -> Path:
    """A SentencePiece model with byte fallback, trained on this file."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        input=__file__,
        model_prefix=str(path.with_suffix("")),
        vocab_size=400,
        byte_fallback=True,
        minloglevel=2,
    )
    return path


def test_a_tokenizer_json_is_read(tmp_path):
    tokenizer = load_tokenizer(write_ascii_tokenizer(tmp_path / "tokenizer.json"))
    assert tokenizer.encode(PROMPT) == list(PROMPT.encode())
    assert tokenizer.decode([72, 105, 999]) == "Hi"  # 999: padding of the model's vocabulary
    assert tokenizer.n_words == 128 and tokenizer.stop_tokens == ()


def test_a_sentencepiece_model_is_read_and_streams(tmp_path):
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path / "tokenizer.model"))
    assert isinstance(tokenizer, FileTokenizer)
    ids = tokenizer.encode("def test world 👩")
    assert ids[0] == tokenizer._tokenizer.bos_id and ids[1:] == tokenizer.encode(
        "def test world 👩", bos=False
    )
    assert tokenizer.stop_tokens == (tokenizer._tokenizer.eos_id,)
    pieces, text = stream(tokenizer, ids[1:])
    assert text == "def test world 👩" and len(pieces) >= 4
    assert all(FFFD not in piece for piece in pieces)


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match='expected "bytes" or a file, found none'):
        load_tokenizer(tmp_path / "absent.json")
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="expected a Hugging Face tokenizer.json"):
        load_tokenizer(path)


# ---- generating ----


@pytest.fixture(scope="module")
def history_path(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generation")
    return export_plain(HistoryModel(vocab_size=128), folder / "history.pte", get_bos_id=2)


@pytest.fixture(scope="module")
def history(history_path):
    return cuda_int4.load(history_path)


@pytest.fixture(scope="module")
def llama_path(tmp_path_factory) -> Path:
    return export_toy_llama(tmp_path_factory.mktemp("generation") / "llama.pte")


def expected(prompt: list[int], n: int) -> list[int]:
    return greedy(HistoryModel(vocab_size=128), prompt, n)


def test_a_model_says_what_it_is(history):
    info = decode_info(history)
    assert (info.max_context_len, info.max_seq_len, info.vocab_size) == (64, 16, 128)
    assert (info.bos_id, info.eos_ids) == (2, ())


def test_tokens_come_in_order_and_one_by_one(history):
    seen, read = [], []
    generation = generate_tokens(
        history,
        range(1, 8),
        max_new_tokens=12,
        prefill_chunk=3,
        on_token=seen.append,
        on_prefill=read.append,
    )
    assert generation.tokens == seen == expected(list(range(1, 8)), 12)
    assert read == [3, 6, 7]
    assert history.generate(range(1, 8), max_new_tokens=12).tokens == seen
    stats = generation.stats
    assert (stats.prompt_tokens, stats.new_tokens) == (7, 12)
    assert stats.stop_reason == "max_new_tokens" and generation.text is None
    assert json.loads(json.dumps(generation.as_dict()))["tokens"] == seen
    assert "decoded 12 tokens" in str(stats)


def test_text_is_the_same_as_tokens(history):
    pieces = []
    options = {"max_new_tokens": 20, "on_text": pieces.append}
    generation = generate_text(history, ByteTokenizer(), PROMPT, **options)
    assert generation.tokens == expected([2, *PROMPT.encode()], 20)  # behind the begin token
    assert generation.text == "".join(pieces) == bytes(generation.tokens).decode()
    generation = generate_text(history, ByteTokenizer(), PROMPT, bos=False, max_new_tokens=20)
    assert generation.tokens == expected(list(PROMPT.encode()), 20)


def test_a_stop_token_is_a_token_and_no_text(history):
    tokens = expected([2, *PROMPT.encode()], 20)
    n = next(i for i in range(5, 20) if tokens[i] not in tokens[:i])
    generation = generate_text(history, ByteTokenizer(), PROMPT, stop_tokens=[tokens[n]])
    assert generation.tokens == tokens[: n + 1]
    assert generation.text == bytes(tokens[:n]).decode()
    assert generation.stats.stop_reason == "stop_token"


def test_a_conversation_goes_on_where_it_stopped(history):
    first = generate_tokens(history, [5, 6, 7], max_new_tokens=6)
    position = first.stats.prompt_tokens + first.stats.new_tokens - 1
    second = generate_tokens(
        history, [first.tokens[-1], 9, 10], start_pos=position, max_new_tokens=6
    )
    assert second.tokens == expected([5, 6, 7, *first.tokens, 9, 10], 6)
    sampled = {"temperature": 1.0, "seed": 11}
    whole = generate_tokens(history, [5], max_new_tokens=9, **sampled).tokens
    part = generate_tokens(history, [5], max_new_tokens=4, **sampled).tokens
    rest = generate_tokens(history, part[-1:], start_pos=4, max_new_tokens=5, **sampled).tokens
    assert whole == part + rest


def test_an_exception_in_a_callback_ends_the_generation_and_arrives(history):
    seen = []

    def stop_at_three(token):
        seen.append(token)
        if len(seen) == 3:
            raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        generate_tokens(history, [1], on_token=stop_at_three)
    assert len(seen) == 3
    seen.clear()
    with pytest.raises(LookupError, match="enough"):
        generate_tokens(history, [1] * 9, prefill_chunk=3, on_prefill=stop_at_three)


def test_a_callback_may_use_the_model_but_not_close_it(history):
    alone = generate_tokens(history, [1, 2], max_new_tokens=4).tokens
    seen = []

    def look(token):
        seen.append(history.run("get_max_context_len")[0].item())

    assert generate_tokens(history, [1, 2], max_new_tokens=4, on_token=look).tokens == alone
    assert seen == [64] * 4
    with pytest.raises(RuntimeError, match="close: expected no generation in progress"):
        generate_tokens(history, [1], on_token=lambda token: history.close())
    assert generate_tokens(history, [1, 2], max_new_tokens=4).tokens == alone


def test_an_interrupt_carries_what_there_was(history):
    pieces = []

    def interrupt_at_four(piece):
        pieces.append(piece)
        if len(pieces) == 4:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(GenerationInterrupted) as caught:
        generate_text(history, ByteTokenizer(), PROMPT, on_text=interrupt_at_four)
    generation = caught.value.generation
    assert len(generation.tokens) >= 4 and generation.text == bytes(generation.tokens).decode()
    assert generation.stats.stop_reason == "interrupted"


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"prompt": []}, _native.CudaInt4Error, "at least one token, got none"),
        ({"prompt": [1] * 65}, _native.CudaInt4Error, "prompt has 65 tokens, the context holds 64"),
        ({"start_pos": 60, "prompt": [1] * 5}, _native.CudaInt4Error, "and 60 of them are taken"),
        ({"start_pos": 65}, _native.CudaInt4Error, "start position in 0..64, got 65"),
        ({"start_pos": -1}, ValueError, "expected start_pos in 0.."),
        ({"seed": 2**64}, ValueError, "expected seed in 0..18446744073709551615, got"),
        ({"top_k": -1}, ValueError, "expected top_k in 0.."),
        ({"prompt": [2**63]}, ValueError, "expected prompt of int64 ids"),
        ({"prompt": [128]}, _native.CudaInt4Error, "prompt tokens in 0..127, got 128"),
        ({"temperature": -1.0}, _native.CudaInt4Error, "temperature: expected"),
        (
            {"max_new_tokens": 0},
            ValueError,
            "expected max_new_tokens in 1..[0-9]*, got 0",
        ),
        (
            {"prefill_chunk": 0},
            ValueError,
            "expected prefill_chunk in 1..[0-9]*, got 0",
        ),
    ],
)
def test_what_cannot_be_generated_is_refused(history, options, error, reason):
    with pytest.raises(error, match=reason):
        generate_tokens(history, **{"prompt": [1], **options})
    assert generate_tokens(history, [1], max_new_tokens=3).tokens == expected([1], 3)


# ---- cuda-int4 run ----


def test_run_prints_text_and_times(history_path, capsys):
    code = cli.main(["run", str(history_path), "--prompt", PROMPT, "--max-new", "20"])
    output = capsys.readouterr()
    assert code == 0
    assert output.out == bytes(expected([2, *PROMPT.encode()], 20)).decode() + "\n"
    assert "decoded 20 tokens" in output.err


def test_run_prints_what_the_cpp_program_prints(history_path, capsys):
    program = _native.package_dir() / "bin" / "cuda-int4-decode"
    for options in (
        ["--prompt", PROMPT, "--temperature", "0.9", "--top-p", "0.8", "--seed", "5"],
        ["--tokens", "1,2,3", "--temperature", "2", "--top-k", "7", "--prefill-chunk", "2"],
        ["--prompt", PROMPT, "--no-bos", "--print-tokens", "--max-new", "9"],
    ):
        done = subprocess.run([program, history_path, *options], capture_output=True, check=True)
        assert cli.main(["run", str(history_path), *options]) == 0
        assert capsys.readouterr().out == done.stdout.decode()
        done = subprocess.run([program, history_path, *options, "--json"], capture_output=True)
        assert cli.main(["run", str(history_path), *options, "--json"]) == 0
        ours, theirs = json.loads(capsys.readouterr().out), json.loads(done.stdout)
        assert ours["tokens"] == theirs["tokens"] and ours.keys() >= theirs.keys()
        if "--prompt" in options:
            assert ours["text"] == theirs["text"]


def test_run_with_a_tokenizer_file(history_path, tmp_path, capsys):
    tokenizer = write_ascii_tokenizer(tmp_path / "tokenizer.json")
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(PROMPT)
    options = ["--tokenizer", str(tokenizer), "--prompt-file", str(prompt), "--max-new", "20"]
    assert cli.main(["run", str(history_path), *options]) == 0
    text = bytes(expected(list(PROMPT.encode()), 20)).decode()
    assert capsys.readouterr().out == text + "\n"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], "one of the arguments --prompt --prompt-file --tokens --prompts --token-lists is"),
        (["--prompt", "a", "--tokens", "1"], "not allowed with"),
        (["--tokens", "1,x"], "expected an integer >= 0, got 'x'"),
        (["--prompt", "a", "--top-p", "0"], "expected 0 < P <= 1, got '0'"),
        (["--prompt", "a", "--temperature", "inf"], "expected a number >= 0, got 'inf'"),
        (["--prompt", "a", "--max-new", "0"], "expected an integer >= 1, got '0'"),
        (["--prompt", "a", "--device", "tpu"], "expected auto, cpu, cuda or cuda:N"),
    ],
)
def test_run_refuses_a_wrong_command_line(options, reason, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["run", "model.pte", *options])
    assert exit_.value.code == 2 and reason in capsys.readouterr().err


def test_run_gives_the_reason_of_a_failure(history_path, tmp_path, capsys):
    assert cli.main(["run", str(tmp_path / "absent.pte"), "--prompt", "a"]) == 1
    assert "absent.pte" in capsys.readouterr().err
    big = export_plain(HistoryModel(vocab_size=600), tmp_path / "big.pte")
    assert cli.main(["run", str(big), "--prompt", "a"]) == 1
    assert "a model whose tokens are bytes, got one of 600 tokens" in capsys.readouterr().err


def test_ctrl_c_ends_run_cleanly(tmp_path):
    path = export_plain(HistoryModel(context=1_000_000), tmp_path / "endless.pte", max_seq_len=2)
    command = [sys.executable, "-m", "cuda_int4.cli", "run", str(path), "--tokens", "1,2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    head = b"".join(process.stdout.read(1) for _ in range(12))
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    tail, stderr = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130, stderr.decode()
    tokens = (head + tail).decode()
    assert tokens.endswith("\n")
    assert f"decoded {len(tokens.split())} tokens" in stderr.decode()
    assert "Traceback" not in stderr.decode()


# ---- stock ExecuTorch ----


def text_llm_runner(path: Path, tokenizer: Path, prompt: str, n: int) -> list[int]:
    """``n`` greedy tokens of executorch's own runner, which calls back with one character each."""
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    cuda_int4.load_runtime()
    pieces: list[str] = []
    config = GenerationConfig(max_new_tokens=n, temperature=0.0, echo=False)
    TextLLMRunner(str(path), str(tokenizer)).generate(prompt, config, token_callback=pieces.append)
    return list("".join(pieces).encode())


def test_text_llm_runner_decodes_the_same_tokens(history_path, llama_path, tmp_path):
    tokenizer = write_ascii_tokenizer(tmp_path / "tokenizer.json")
    prompt = list(PROMPT.encode())
    assert text_llm_runner(history_path, tokenizer, PROMPT, 20) == expected(prompt, 20)
    tokens = text_llm_runner(llama_path, tokenizer, PROMPT, 40)
    assert tokens == generate_tokens(cuda_int4.load(llama_path), prompt, max_new_tokens=40).tokens
    assert tokens == greedy(toy_llama(), prompt, 40)
