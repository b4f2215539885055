"""``cuda-int4 run``: text out of a .pte at the command line.

The options are those of the C++ program cuda-int4-decode, which needs no Python; this command adds
tokenizers.
"""

import argparse
import io
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import _native
from ..batch import (
    BatchGeneration,
    BatchInterrupted,
    generate_text_batch,
    generate_token_batch,
)
from ..generation import Generation, GenerationInterrupted, decode_info, generate_text
from ..text_stream import ByteTokenizer, Tokenizer, load_tokenizer

MAX_BYTE_VOCAB = 512  # bytes, and room for the special tokens behind them


def _integer(low: int) -> Callable[[str], int]:
    """An argparse type: an integer >= ``low``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"expected an integer >= {low}, got {text!r}")
        return value

    return parse


def _number(accepts: Callable[[float], bool], expected: str) -> Callable[[str], float]:
    """An argparse type: a finite number that ``accepts`` takes, ``expected`` in words."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and accepts(value)):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"expected auto, cpu, cuda or cuda:N, got {text!r}")
    return text


def _token_list(text: str) -> list[int]:
    """An argparse type: ids with commas between."""
    return [_integer(0)(word) for word in text.split(",")]


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``run_command``."""
    parser.add_argument("model", metavar="MODEL.pte", help="the exported language model")

    prompt = parser.add_argument_group("prompt").add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue")
    prompt.add_argument("--prompt-file", metavar="FILE", help='the same, from a file ("-": stdin)')
    prompt.add_argument(
        "--tokens", metavar="IDS", type=_token_list, help="ids such as 1,15043; ids come back"
    )
    prompt.add_argument(
        "--prompts",
        metavar="FILE",
        help='one prompt a line ("-": stdin), as many at once as the model was exported for',
    )
    prompt.add_argument(
        "--token-lists", metavar="FILE", help="the same of ids, a line such as 1,15043 for each"
    )
    text = parser.add_argument_group("text")
    text.add_argument(
        "--tokenizer",
        metavar="bytes|FILE",
        default="bytes",
        help="bytes (default): the model's tokens are the bytes of UTF-8; "
        "FILE: a tokenizer.json, SentencePiece or tiktoken file",
    )
    text.add_argument(
        "--no-bos",
        action="store_true",
        help="do not put the begin token in front (a tokenizer.json decides that itself)",
    )

    much = parser.add_argument_group("how much")
    much.add_argument(
        "--max-new",
        metavar="N",
        type=_integer(1),
        help="stop after N new tokens (default: at a stop token or the end of the context)",
    )
    much.add_argument(
        "--stop-token",
        metavar="ID",
        type=_integer(0),
        action="append",
        default=[],
        help="stop at this token too; may be repeated",
    )
    much.add_argument(
        "--prefill-chunk",
        metavar="N",
        type=_integer(1),
        help="prompt tokens per forward (default: as many as the model takes)",
    )

    choice = parser.add_argument_group("how tokens are chosen (in this order)")
    choice.add_argument(
        "--temperature",
        metavar="T",
        type=_number(lambda t: t >= 0, "a number >= 0"),
        default=0.0,
        help="0: always the likeliest (default); 1: as the model says; higher: wilder",
    )
    choice.add_argument(
        "--top-k",
        metavar="K",
        type=_integer(0),
        default=0,
        help="draw from the K likeliest tokens only (default: 0, off)",
    )
    choice.add_argument(
        "--top-p",
        metavar="P",
        type=_number(lambda p: 0 < p <= 1, "0 < P <= 1"),
        default=1.0,
        help="draw from the fewest likeliest tokens that hold P of the probability (default: 1)",
    )
    choice.add_argument(
        "--min-p",
        metavar="P",
        type=_number(lambda p: 0 <= p <= 1, "0 <= P <= 1"),
        default=0.0,
        help="draw from tokens at least P times as likely as the likeliest (default: 0, off)",
    )
    choice.add_argument(
        "--seed",
        metavar="N",
        type=_integer(0),
        default=0,
        help="the same seed gives the same tokens, on any machine (default: 0)",
    )
    choice.add_argument(
        "--sequence",
        metavar="N",
        type=_integer(0),
        default=0,
        help="draws of one seed are independent from one number to another (default: 0); of "
        "several prompts the first has this number, the next one the next",
    )

    machine = parser.add_argument_group("model and machine")
    machine.add_argument("--data", metavar="FILE.ptd", help="weights exported into a file apart")
    machine.add_argument(
        "--device",
        type=_device,
        default="auto",
        metavar="NAME",
        help="auto, cpu, cuda or cuda:N (default: auto, a GPU if there is one)",
    )
    machine.add_argument(
        "--no-cuda-graph", action="store_true", help="on a GPU, launch kernel by kernel always"
    )
    machine.add_argument(
        "--no-device-loop", action="store_true", help="on a GPU, choose each token on the host"
    )
    machine.add_argument(
        "--no-verify",
        action="store_true",
        help="skip the checksums over the weights: a faster start, damage not noticed",
    )
    machine.add_argument("--threads", metavar="N", type=_integer(1), help="CPU threads")

    output = parser.add_argument_group("output (tokens on stdout, times on stderr)")
    output.add_argument("--print-tokens", action="store_true", help="ids, even for a text prompt")
    output.add_argument("--verbose", action="store_true", help="ExecuTorch's log too, on stderr")
    output.add_argument(
        "--json", action="store_true", help="nothing but one JSON object: tokens, text, times"
    )


def run_command(args: argparse.Namespace) -> int:
    """Run ``cuda-int4 run``; 0, or 130 after Ctrl-C.

    Raises:
        CudaInt4Error, OSError, ValueError: the reason is in the text.
    """
    from ..model import load

    tokenizer = load_tokenizer(args.tokenizer)
    if args.threads is not None:
        _native.check(_native.library().set_num_threads(args.threads))
    model = load(
        args.model,
        args.data,
        device=args.device,
        verify=not args.no_verify,
        cuda_graph=not args.no_cuda_graph,
        device_loop=not args.no_device_loop,
    )
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character
    options: dict[str, Any] = {
        "max_new_tokens": args.max_new,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "seed": args.seed,
        "sequence": args.sequence,
        "stop_tokens": args.stop_token,
        "prefill_chunk": args.prefill_chunk,
    }
    if args.prompts is not None or args.token_lists is not None:
        return _run_prompts(args, model, tokenizer, options)
    as_ids = args.tokens is not None or args.print_tokens
    n_shown = 0

    def show(piece: Any) -> None:
        nonlocal n_shown
        if not args.json:
            print(f"{' ' if as_ids and n_shown else ''}{piece}", end="", flush=True)
            n_shown += 1

    interrupted = False
    try:
        if args.tokens is not None:
            generation = model.generate(args.tokens, on_token=show, **options)
        else:
            if isinstance(tokenizer, ByteTokenizer):
                _check_byte_vocab(args.model, model)
            options["on_token" if as_ids else "on_text"] = show
            generation = generate_text(
                model, tokenizer, _prompt(args), bos=not args.no_bos, **options
            )
    except GenerationInterrupted as error:
        generation, interrupted = error.generation, True
    finally:
        if n_shown:
            print()
    _report(generation, as_json=args.json)
    return 130 if interrupted else 0


def _run_prompts(
    args: argparse.Namespace, model: Any, tokenizer: Tokenizer, options: dict[str, Any]
) -> int:
    """Each prompt of the file with what continues it, in their order, as soon as it is whole."""
    path = args.prompts if args.prompts is not None else args.token_lists
    prompts = _lines(path)
    as_ids = args.token_lists is not None or args.print_tokens
    ended: dict[int, str] = {}
    n_shown = 0

    def show(index: int) -> None:
        nonlocal n_shown
        print(f"{chr(10) if n_shown else ''}==> {index + 1}: {_head(prompts[index])} <==")
        print(ended.pop(index), flush=True)
        n_shown = index + 1

    def end(index: int, continuation: str) -> None:
        ended[index] = continuation
        while not args.json and n_shown in ended:
            show(n_shown)

    def end_ids(index: int, tokens: list[int]) -> None:
        end(index, " ".join(map(str, tokens)))

    interrupted = False
    try:
        if args.token_lists is not None:
            batch = generate_token_batch(model, _id_lists(path, prompts), on_end=end_ids, **options)
        else:
            if isinstance(tokenizer, ByteTokenizer):
                _check_byte_vocab(args.model, model)
            options.update({"on_end": end_ids} if as_ids else {"on_text": end})
            batch = generate_text_batch(model, tokenizer, prompts, bos=not args.no_bos, **options)
    except BatchInterrupted as error:
        batch, interrupted = error.batch, True
        for index, generation in enumerate(batch.generations):
            if index < n_shown or not generation.tokens:
                continue
            if as_ids:
                end_ids(index, generation.tokens)
            else:
                end(index, generation.text or "")
    finally:
        if not args.json:  # those that waited for one in front of them
            for index in sorted(ended):
                show(index)
    _report(batch, as_json=args.json)
    return 130 if interrupted else 0


def _lines(path: str) -> list[str]:
    """The lines of a file of prompts.

    Raises:
        ValueError: there is none, or an empty one.
    """
    lines = _read(path).split("\n")
    if lines[-1] == "":  # behind the last line's end
        lines.pop()
    if not lines:
        raise ValueError(f"{path}: expected a prompt a line, got an empty file")
    lines = [line.removesuffix("\r") for line in lines]
    for number, line in enumerate(lines, 1):
        if not line:
            raise ValueError(f"{path}:{number}: expected a prompt, got an empty line; delete it")
    return lines


def _id_lists(path: str, lines: list[str]) -> list[list[int]]:
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(_token_list(line))
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    return found


def _head(prompt: str, n: int = 60) -> str:
    """As much of a prompt as goes on a line."""
    return prompt if len(prompt) <= n else f"{prompt[: n - 3]}..."


def _prompt(args: argparse.Namespace) -> str:
    return args.prompt if args.prompt is not None else _read(args.prompt_file)


def _read(path: str) -> str:
    data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    return data.decode("utf-8", "surrogateescape")


def _check_byte_vocab(path: str, model: Any) -> None:
    vocab_size = decode_info(model).vocab_size
    if vocab_size > MAX_BYTE_VOCAB:
        raise ValueError(
            f"{path}: expected a model whose tokens are bytes, got one of {vocab_size} tokens; "
            "give --tokenizer FILE, or --tokens"
        )


def _report(generation: Generation | BatchGeneration, *, as_json: bool) -> None:
    sys.stdout.flush()
    if as_json:
        print(json.dumps(generation.as_dict()), flush=True)
    else:
        print(generation.stats, file=sys.stderr)
