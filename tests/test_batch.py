"""Several sequences in one call: the loop, ``run --prompts``, and real models, row by row."""

from __future__ import annotations

import importlib.util
import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cuda_int4
from cuda_int4 import _native, cli
from cuda_int4 import batch as batch_module
from cuda_int4.batch import BatchInterrupted, generate_text_batch, generate_token_batch
from cuda_int4.generation import decode_info
from cuda_int4.text_stream import ByteTokenizer
from language_models import HistoryModel, export_plain, export_rows, greedy

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "export_examples" / "byte_llama")]

import decode_model  # noqa: E402

PROMPTS = [[5, 6, 7], [9], [1] * 30, [3, 2], [8, 8], [4] * 17, [7, 1]]
TEXTS = ["def f(x)", "import", "x"]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return export_rows(tmp_path_factory.mktemp("batch") / "four.pte", 4, vocab_size=128)


@pytest.fixture(scope="module")
def four(path):
    return cuda_int4.load(path)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batch")
    return cuda_int4.load(export_plain(HistoryModel(vocab_size=128), folder / "one.pte"))


def expected(prompt: list[int], n: int) -> list[int]:
    return greedy(HistoryModel(vocab_size=128), prompt, n)


# ---- the loop ----


def test_a_model_says_how_many_it_takes(four, one):
    info = decode_info(four)
    assert (info.max_context_len, info.max_seq_len, info.vocab_size) == (64, 16, 128)
    assert (info.bos_id, info.eos_ids) == (None, ())
    assert (info.max_sequences, decode_info(one).max_sequences) == (4, 1)


@pytest.mark.parametrize("n_prompts", [1, 2, 4, 5, 7])
@pytest.mark.parametrize("options", [{}, {"prefill_chunk": 7}, {"prefill_chunk": 1}])
def test_each_prompt_goes_on_as_if_alone(four, n_prompts, options):
    """Ragged prompts, longer than a forward takes, more of them than the model does."""
    prompts = PROMPTS[:n_prompts]
    batch = generate_token_batch(four, prompts, max_new_tokens=12, **options)
    assert [g.tokens for g in batch.generations] == [expected(p, 12) for p in prompts]
    assert {g.stats.stop_reason for g in batch.generations} == {"max_new_tokens"}
    assert [g.stats.prompt_tokens for g in batch.generations] == [len(p) for p in prompts]
    stats = batch.stats
    assert (stats.n_prompts, stats.n_at_once) == (n_prompts, min(n_prompts, 4))
    assert (stats.prompt_tokens, stats.new_tokens) == (sum(map(len, prompts)), 12 * n_prompts)


def test_a_model_of_one_sequence_takes_them_one_by_one(one):
    batch = generate_token_batch(one, PROMPTS, max_new_tokens=5)
    assert [g.tokens for g in batch.generations] == [expected(p, 5) for p in PROMPTS]
    assert batch.stats.n_at_once == 1


def test_rows_end_by_themselves(four):
    """At a stop token or the end of the context, while others go on, in front of them or behind."""
    prompts = [[1] * 50, [5, 6, 7], [1] * 64, [9]]
    alone = [expected(p, min(40, 65 - len(p))) for p in prompts]
    stop = alone[1][6]
    wanted, reasons = [], []
    for prompt, tokens in zip(prompts, alone, strict=True):
        n = tokens.index(stop) + 1 if stop in tokens else len(tokens)
        wanted.append(tokens[:n])
        at_end = len(prompt) + n == 65
        reasons.append("stop_token" if tokens[n - 1] == stop else
                       "end_of_context" if at_end else "max_new_tokens")  # fmt: skip
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        ended = []
        batch = generate_token_batch(
            four,
            [prompts[i] for i in order],
            max_new_tokens=40,
            stop_tokens=[stop],
            on_end=lambda index, tokens, ended=ended: ended.append((index, list(tokens))),
        )
        assert [g.tokens for g in batch.generations] == [wanted[i] for i in order]
        assert [g.stats.stop_reason for g in batch.generations] == [reasons[i] for i in order]
        assert sorted(ended) == [(at, wanted[i]) for at, i in enumerate(order)]
        lengths = [len(tokens) for _, tokens in ended]
        assert lengths == sorted(lengths)  # as soon as they ended


def test_what_is_drawn_for_a_prompt_is_its_place_s_alone(four, one):
    options = {"max_new_tokens": 10, "temperature": 1.5, "top_p": 0.95, "seed": 3}
    together = generate_token_batch(four, PROMPTS, **options)
    by_itself = generate_token_batch(one, PROMPTS, **options)
    tokens = [g.tokens for g in together.generations]
    assert tokens == [g.tokens for g in by_itself.generations]
    assert tokens[0] == one.generate(PROMPTS[0], **options).tokens  # the first of a seed
    same = generate_token_batch(four, [PROMPTS[0]] * 4, **options)
    assert len({tuple(g.tokens) for g in same.generations}) == 4
    other = generate_token_batch(four, PROMPTS[:1] + PROMPTS[4:], **options)
    assert other.generations[0].tokens == tokens[0]


def test_min_p_and_top_k_choose_the_likeliest_when_nothing_else_is_left(four):
    greedy_tokens = [
        g.tokens for g in generate_token_batch(four, PROMPTS, max_new_tokens=6).generations
    ]
    for only in ({"min_p": 1.0}, {"top_k": 1}):
        options = {"max_new_tokens": 6, "temperature": 2.0, **only}
        batch = generate_token_batch(four, PROMPTS, **options)
        assert [g.tokens for g in batch.generations] == greedy_tokens


def test_tokens_arrive_as_they_are_chosen(four):
    seen = []
    batch = generate_token_batch(
        four, PROMPTS[:3], max_new_tokens=3, on_token=lambda i, token: seen.append((i, token))
    )
    tokens = [g.tokens for g in batch.generations]
    assert seen == [(i, tokens[i][step]) for step in range(3) for i in range(3)]


def test_an_exception_in_a_callback_ends_the_batch_and_arrives(four):
    class Enough(Exception):
        pass

    def stop(index, _token):
        if index == 2:
            raise Enough

    with pytest.raises(Enough):
        generate_token_batch(four, PROMPTS, on_token=stop)
    batch = generate_token_batch(four, PROMPTS[:1], max_new_tokens=3)  # nothing is left over
    assert batch.generations[0].tokens == expected(PROMPTS[0], 3)


def test_an_interrupt_carries_what_there_was(four):
    def interrupt(index, _token):
        if index == 5:  # of the second group
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(BatchInterrupted) as raised:
        generate_token_batch(four, PROMPTS, max_new_tokens=4, on_token=interrupt)
    batch = raised.value.batch
    assert [len(g.tokens) for g in batch.generations] == [4, 4, 4, 4, 2, 1, 1]
    reasons = [g.stats.stop_reason for g in batch.generations]
    assert reasons == ["max_new_tokens"] * 4 + ["interrupted"] * 3  # at their next token
    assert batch.stats.new_tokens == 20
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("prompts", "options", "reason"),
    [
        ([], {}, "expected at least one prompt, got none"),
        ([[1], []], {}, "prompt 2 of 2: expected at least one token, got none"),
        ([[1], [2], [1] * 65], {}, "prompt 3 of 3: has 65 tokens, the context holds 64"),
        ([[1], [128]], {}, "prompt 2 of 2: expected tokens in 0..127, got 128"),
        ([[-1]], {}, "prompt 1 of 1: expected tokens in 0..127, got -1"),
        ([[1]], {"seed": -1}, "expected seed in 0.."),
        ([[1]], {"max_new_tokens": 0}, "expected max_new_tokens in 1.."),
    ],
)
def test_what_cannot_be_generated_is_refused_before_anything_runs(four, prompts, options, reason):
    seen = []
    with pytest.raises(ValueError, match=reason):
        generate_token_batch(four, prompts, on_token=lambda *a: seen.append(a), **options)
    assert not seen


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_p": 0.0}, {"min_p": 1.5}])
def test_a_choice_out_of_range_is_refused(four, options):
    with pytest.raises(_native.CudaInt4Error, match=f"{next(iter(options))}: expected"):
        generate_token_batch(four, [[1]], **options)


def test_texts_are_the_same_as_tokens(four):
    batch = generate_text_batch(four, ByteTokenizer(), TEXTS, max_new_tokens=9)
    for text, generation in zip(TEXTS, batch.generations, strict=True):
        assert generation.tokens == expected(list(text.encode()), 9)
        assert generation.text == bytes(generation.tokens).decode()
    stop = batch.generations[1].tokens[4]
    batch = generate_text_batch(four, ByteTokenizer(), TEXTS, max_new_tokens=9, stop_tokens=[stop])
    generation = batch.generations[1]
    n = generation.tokens.index(stop)
    assert (
        generation.tokens[-1] == stop and generation.text == bytes(generation.tokens[:n]).decode()
    )


# ---- cuda-int4 run --prompts ----


def sections(output: str) -> dict[str, str]:
    """What stands below each header line."""
    parts = output.split("==> ")[1:]
    heads = [part.partition(" <==\n") for part in parts]
    return {head: text.removesuffix("\n") for head, _, text in heads}


def test_run_prints_each_prompt_and_what_continues_it(path, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    texts = [*TEXTS, "a" * 30, "y = 1"]
    file.write_text("\n".join(texts) + "\n")
    assert cli.main(["run", str(path), "--prompts", str(file), "--max-new", "8"]) == 0
    output = capsys.readouterr()
    want = {
        f"{i}: {text}": bytes(expected(list(text.encode()), 8)).decode()
        for i, text in enumerate(texts, 1)
    }
    # A generated line end may stand at the end of a text.
    assert {k: v.rstrip("\n") for k, v in sections(output.out).items()} == {
        k: v.rstrip("\n") for k, v in want.items()
    }
    assert "5 prompts of" in output.err and "4 at once" in output.err
    assert "tokens/s in all" in output.err and "tokens/s each" in output.err


def test_run_prints_ids_and_json(path, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\r\n".join(TEXTS).encode())))
    options = ["--prompts", "-", "--max-new", "5", "--no-bos", "--print-tokens"]
    assert cli.main(["run", str(path), *options]) == 0
    tokens = [expected(list(text.encode()), 5) for text in TEXTS]
    found = [text.strip() for text in sections(capsys.readouterr().out).values()]
    assert found == [" ".join(map(str, ids)) for ids in tokens]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(TEXTS))
    options = ["--prompts", str(file), "--max-new", "5", "--no-bos", "--json"]
    assert cli.main(["run", str(path), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [one["tokens"] for one in report["sequences"]] == tokens
    assert report["total"]["n_prompts"] == 3 and report["total"]["new_tokens"] == 15


def test_run_chooses_what_the_cpp_program_chooses(path, tmp_path, capsys):
    program = _native.package_dir() / "bin" / "cuda-int4-decode"
    texts, lists = tmp_path / "texts.txt", tmp_path / "lists.txt"
    texts.write_text("\n".join([*TEXTS, "a" * 30, "y = 1"]))
    lists.write_text("".join(f"{','.join(map(str, prompt))}\n" for prompt in PROMPTS))
    for options in (
        ["--prompts", str(texts), "--temperature", "0.9", "--top-p", "0.8", "--seed", "5"],
        ["--token-lists", str(lists), "--temperature", "2", "--min-p", "0.1", "--sequence", "3"],
        ["--token-lists", str(lists), "--max-new", "7", "--prefill-chunk", "3"],
    ):
        options = [*options, "--json"]
        done = subprocess.run([program, path, *options], capture_output=True, check=True)
        assert cli.main(["run", str(path), *options]) == 0
        ours, theirs = json.loads(capsys.readouterr().out), json.loads(done.stdout)
        for a, b in zip(ours["sequences"], theirs["sequences"], strict=True):
            assert a["tokens"] == b["tokens"] and a.get("text") == b.get("text")
            assert a["stop_reason"] == b["stop_reason"] and a.keys() >= b.keys()
        counts = ("prompt_tokens", "new_tokens")
        assert [ours["total"][name] for name in counts] == [
            theirs["total"][name] for name in counts
        ]


def test_run_of_token_lists_gives_ids(path, tmp_path, capsys):
    file = tmp_path / "lists.txt"
    file.write_text("5,6,7\n9\n")
    assert cli.main(["run", str(path), "--token-lists", str(file), "--max-new", "4"]) == 0
    wanted = [" ".join(map(str, expected(prompt, 4))) for prompt in ([5, 6, 7], [9])]
    assert (
        capsys.readouterr().out == f"==> 1: 5,6,7 <==\n{wanted[0]}\n\n==> 2: 9 <==\n{wanted[1]}\n"
    )
    file.write_text("5,6,7\n9,x\n")
    assert cli.main(["run", str(path), "--token-lists", str(file)]) == 1
    assert "lists.txt:2: expected an integer >= 0, got 'x'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "expected a prompt a line, got an empty file"),
        ("a\n\nb\n", "prompts.txt:2: expected a prompt, got an empty line"),
        ("a\n" + "b" * 65 + "\n", "prompt 2 of 2: has 65 tokens, the context holds 64"),
    ],
)
def test_run_refuses_prompts_before_it_prints_any(path, tmp_path, capsys, content, reason):
    file = tmp_path / "prompts.txt"
    file.write_text(content)
    assert cli.main(["run", str(path), "--prompts", str(file)]) == 1
    output = capsys.readouterr()
    assert reason in output.err and not output.out


def test_run_prints_what_there_is_after_ctrl_c(path, tmp_path, capsys, monkeypatch):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(TEXTS))
    generate = batch_module.generate_token_batch

    def interrupting(*args, on_end, **options):
        calls = []

        def on_token(_index, _token):
            calls.append(1)
            if len(calls) == 8:
                signal.raise_signal(signal.SIGINT)

        return generate(*args, on_end=on_end, on_token=on_token, **options)

    monkeypatch.setattr(batch_module, "generate_token_batch", interrupting)
    assert cli.main(["run", str(path), "--prompts", str(file), "--print-tokens"]) == 130
    found = [len(text.split()) for text in sections(capsys.readouterr().out).values()]
    assert found == [4, 3, 3]  # each ends at its next token


# ---- real models ----


def export_decoder(name: str, folder: Path, max_sequences: int, activation: str, **options) -> Path:
    model = decode_model.build(
        decode_model.MODELS[name],
        max_context=64,
        dtype=torch.float32,
        group_size=32,
        activation=activation,
        max_sequences=max_sequences,
    )
    example, free = decode_model.example_call(32, max_sequences)
    methods = {
        "get_max_seq_len": 32,
        "get_max_context_len": 64,
        "get_vocab_size": 512,
        "get_eos_ids": [],
        "get_max_batch": max_sequences,
    }
    return cuda_int4.export(
        model,
        example,
        folder / f"{name}-{max_sequences}.pte",
        dynamic_shapes=free,
        activation=activation,
        constant_methods=methods,
        **options,
    )


@pytest.mark.parametrize("activation", ["none", "int8"])
@pytest.mark.parametrize("name", ["toy-llama", "toy-gemma"])
def test_each_row_of_a_decoder_is_as_if_alone(name, activation, tmp_path):
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(512, (n,), generator=generator).tolist() for n in (3, 40, 1, 17, 9)]
    tokens = []
    for max_sequences in (1, 4):
        with cuda_int4.load(export_decoder(name, tmp_path, max_sequences, activation)) as model:
            batch = generate_token_batch(model, prompts, max_new_tokens=16)
        tokens.append([g.tokens for g in batch.generations])
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("fusions", ["all", "none"])
@pytest.mark.parametrize("activation", ["none", "int8"])
def test_rows_are_to_the_bit_what_they_are_alone_at_the_same_size(activation, fusions, tmp_path):
    """What differs between sizes of a batch is the order of sums: not what is summed."""
    one, four = (
        cuda_int4.load(export_decoder("toy-llama", tmp_path, n, activation, fusions=fusions))
        for n in (1, 4)
    )
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(512, (4, 12), generator=generator)
    places = torch.arange(12).repeat(4, 1)
    next_tokens = torch.randint(512, (4, 1), generator=generator)

    def logits(model, rows):
        calls = [(tokens[rows], places[rows]), (next_tokens[rows], places[rows][:, -1:] + 1)]
        model.reset()
        return torch.stack([model.forward(*call)[0] for call in calls])

    together = logits(four, [0, 1, 2, 3])
    assert together.isfinite().all()
    for order in ([3, 1, 0, 2], [0, 0, 0, 0], [2, 1, 1, 1]):  # nothing of one row is in another
        assert torch.equal(logits(four, order), together[:, order])
    alone = logits(four, [2])
    one_calls = [(tokens[2:3], places[2]), (next_tokens[2:3], places[2, -1:] + 1)]
    assert torch.equal(alone, torch.stack([one.forward(*call)[0] for call in one_calls]))
    assert torch.allclose(alone, together[:, 2:3], atol=1e-4 if activation == "none" else 0.2)


def test_a_shorter_row_that_repeats_its_last_token_is_as_if_it_were_alone(tmp_path):
    with cuda_int4.load(export_decoder("toy-llama", tmp_path, 4, "none")) as model:
        tokens = torch.randint(512, (2, 9), generator=torch.Generator().manual_seed(3))
        tokens[1, 4:] = tokens[1, 3]
        places = torch.arange(9).repeat(2, 1).clamp(max=torch.tensor([[8], [3]]))
        padded = model.forward(tokens, places)[0][1]
        after = model.forward(tokens[:, :1], torch.tensor([[9], [4]]))[0][1]
        model.reset()
        short = model.forward(tokens[1:, :4], places[1:, :4])[0][0]
        short_after = model.forward(tokens[1:, :1], torch.tensor([[4]]))[0][0]
    assert torch.allclose(padded, short, atol=1e-4)
    assert torch.allclose(after, short_after, atol=1e-4)
    assert float(padded.std()) > 0.1


def test_a_split_does_not_fix_the_batch(tmp_path):
    """ExecuTorch's own check would: it takes len() of the first result of a chunk."""
    path = export_decoder("toy-llama", tmp_path, 3, "none", fusions="none")
    with cuda_int4.load(path) as model:
        for B in (1, 2, 3):
            tokens, places = torch.arange(4).repeat(B, 1), torch.arange(4).repeat(B, 1)
            (logits,) = model.forward(tokens, places)
            assert logits.shape == (B, 512) and torch.equal(logits, logits[:1].expand(B, -1))


def test_the_byte_llama_goes_on_with_several_texts(tmp_path):
    import export as byte_llama  # byte_llama/export.py

    texts = ["def read(path):\n", "class A:\n    ", "import "]
    found = []
    for n in (1, 4):
        _, path = byte_llama.build(
            tmp_path / f"{n}.pte", method="min_max", dtype=torch.float32, max_context=96,
            max_sequences=n,
        )  # fmt: skip
        with cuda_int4.load(path) as model:
            assert decode_info(model).max_sequences == n
            batch = generate_text_batch(model, ByteTokenizer(), texts, max_new_tokens=48)
        found.append([g.text for g in batch.generations])
    assert found[0] == found[1]


def test_executorchs_llama_takes_several_sequences(tmp_path):
    where = ROOT / "export_examples" / "llama" / "export.py"
    spec = importlib.util.spec_from_file_location("llama_export", where)
    llama = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(llama)
    model, path = llama.build(
        tmp_path / "llama.pte", n_layers=1, dim=128, max_context=32, max_sequences=3
    )
    worst, size = llama.greatest_difference(model, path, n_tokens=12)
    assert worst <= 1e-4 * size
    report = cuda_int4.inspect(path)
    assert report["constant_methods"]["get_max_batch"] == 3 and not report["outside"]
    alone = llama.build(tmp_path / "alone.pte", n_layers=1, dim=128, max_context=32)[1]
    prompts, found = [[5, 6, 7, 8, 9], [3], [1, 2], [400]], []
    for file in (path, alone):
        with cuda_int4.load(file) as loaded:
            batch = generate_token_batch(loaded, prompts, max_new_tokens=8)
        found.append([one.tokens for one in batch.generations])
    assert found[0] == found[1]
