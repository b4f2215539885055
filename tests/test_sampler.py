"""The sampler, through cuda_int4_sample: what is drawn, how often, and what is refused."""

import collections
import ctypes
import math

import pytest
import torch

from cuda_int4 import _native

GREEDY = {"temperature": 0.0}


def sample(logits: torch.Tensor, position: int = 0, **config) -> int:
    """One token; ``config`` are fields of cuda_int4_generate_config."""
    native = _native.GenerateConfig(**{"top_p": 1.0, **config})
    token = ctypes.c_int64(-1)
    view = _native.tensor_view(logits)
    _native.check(
        _native.library().sample(
            _native.byref(view), _native.byref(native), position, _native.byref(token)
        )
    )
    return token.value


def draws(logits: torch.Tensor, n: int, **config) -> list[int]:
    """``n`` tokens, one per position."""
    return [sample(logits, position, **config) for position in range(n)]


def chi_square(tokens: list[int], probabilities: torch.Tensor) -> float:
    """Pearson's statistic of the counts of ``tokens`` against ``probabilities``."""
    expected = (probabilities * len(tokens)).tolist()
    counts = collections.Counter(tokens)
    assert set(counts) <= {i for i, e in enumerate(expected) if e > 0}
    return sum((counts[i] - e) ** 2 / e for i, e in enumerate(expected) if e > 0)


def chi_square_bound(degrees: int) -> float:
    """About the 1 - 1e-6 quantile (Wilson and Hilferty's approximation)."""
    z = 4.75
    return degrees * (1 - 2 / (9 * degrees) + z * math.sqrt(2 / (9 * degrees))) ** 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_greedy_takes_the_lowest_index_of_equals(dtype):
    logits = torch.tensor([-1.0, 3.5, 2.0, 3.5, float("-inf")], dtype=dtype)
    assert sample(logits, **GREEDY) == 1 == torch.argmax(logits).item()
    assert sample(torch.zeros(9, dtype=dtype), **GREEDY) == 0
    assert sample(torch.tensor([-1.0, -0.0, 0.0], dtype=dtype), **GREEDY) == 1
    assert sample(torch.tensor([-1e-6, 0.0, -0.0], dtype=dtype), **GREEDY) == 1
    many = torch.full((20_000,), -2.0, dtype=dtype)
    many[[19_999, 12_345, 12_346]] = -1.0
    assert sample(many, **GREEDY) == 12_345


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_greedy_agrees_with_argmax(dtype):
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-6, 1e-3, 1.0, 300.0):  # 1e-6: subnormal halves
        for size in (1, 2, 257, 1000, 4096, 9001):
            logits = (torch.randn(size, generator=generator) * scale).to(dtype)
            assert sample(logits, **GREEDY) == torch.argmax(logits.float()).item()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_frequencies_are_those_of_softmax(temperature):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(1)) * 1.5
    tokens = draws(logits, 20_000, temperature=temperature, seed=5)
    expected = torch.softmax(logits.double() / temperature, 0)
    assert chi_square(tokens, expected) < chi_square_bound(11)


def test_frequencies_under_top_k_and_top_p_are_those_of_the_kept_renormalised():
    logits = torch.tensor([0.1, 2.0, 0.0, 1.0, 1.9, -3.0, 0.5])
    kept = torch.softmax(torch.where(logits >= 1.0, logits.double(), -math.inf), 0)
    tokens = draws(logits, 20_000, temperature=1.0, top_k=3, seed=1)
    assert chi_square(tokens, kept) < chi_square_bound(2)
    tokens = draws(logits, 20_000, temperature=1.0, top_k=3, top_p=0.7, seed=1)  # 0.43 + 0.39
    kept = torch.softmax(torch.where(logits >= 1.9, logits.double(), -math.inf), 0)
    assert chi_square(tokens, kept) < chi_square_bound(1)


@pytest.mark.parametrize("top_k", [1, 2, 5, 19, 20, 21, 10**12])
def test_top_k_keeps_exactly_the_k_likeliest(top_k):
    logits = torch.randn(20, generator=torch.Generator().manual_seed(2)) * 0.3
    expected = set(torch.topk(logits, min(top_k, 20)).indices.tolist())
    assert set(draws(logits, 2_000, temperature=1.0, top_k=top_k)) == expected


def test_top_k_of_equals_keeps_the_lower_indices():
    assert set(draws(torch.zeros(10), 500, temperature=1.0, top_k=3)) == {0, 1, 2}


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.5, 0.9, 0.999, 1.0])
def test_top_p_keeps_exactly_the_smallest_set_that_holds_it(top_p):
    logits = torch.randn(15, generator=torch.Generator().manual_seed(3)) * 0.7
    p, order = torch.softmax(logits.double(), 0).sort(descending=True)
    n = int((p.cumsum(0) < top_p - 1e-12).sum()) + 1
    expected = set(order[:n].tolist())
    assert set(draws(logits, 4_000, temperature=1.0, top_p=top_p)) == expected


def test_temperature_comes_before_top_p():
    logits = torch.tensor([2.0, 1.0, 0.0])  # 0.67 0.24 0.09; at temperature 3: 0.45 0.32 0.23
    assert set(draws(logits, 500, temperature=1.0, top_p=0.6)) == {0}
    assert set(draws(logits, 500, temperature=3.0, top_p=0.6)) == {0, 1}


def test_top_k_comes_before_top_p():
    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    # Of all, 0.5 needs two; of the two likeliest (0.57, 0.43) it needs one.
    assert set(draws(logits, 500, temperature=1.0, top_p=0.5)) == {0, 1}
    assert set(draws(logits, 500, temperature=1.0, top_p=0.5, top_k=2)) == {0}


@pytest.mark.parametrize("min_p", [1e-6, 0.1, 0.5, 1.0])
def test_min_p_keeps_exactly_what_is_likely_enough(min_p):
    logits = torch.randn(15, generator=torch.Generator().manual_seed(3)) * 0.7
    p = torch.softmax(logits.double() / 0.5, 0)
    expected = set(torch.nonzero(p >= p.max() * (min_p - 1e-12)).flatten().tolist())
    found = set(draws(logits, 4_000, temperature=0.5, min_p=min_p))
    assert found <= expected
    assert found == expected or min_p < 0.1  # the unlikeliest may never come


def test_min_p_comes_after_top_p():
    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    # Of all, 0.5 needs two; of what min_p leaves (0.57, 0.43) it would need one.
    assert set(draws(logits, 500, temperature=1.0, top_p=0.5, min_p=0.6)) == {0, 1}


def test_low_temperature_is_greedy_and_masked_tokens_never_come():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(4))
    assert set(draws(logits, 200, temperature=1e-30)) == {torch.argmax(logits).item()}
    logits[:] = 0
    logits[::2] = -math.inf
    assert set(draws(logits, 2_000, temperature=5.0)) == set(range(1, 50, 2))


def test_a_draw_depends_on_seed_and_position_alone():
    logits = torch.zeros(1000)
    first = draws(logits, 50, temperature=1.0, seed=7)
    assert first == draws(logits, 50, temperature=1.0, seed=7)
    assert first[31] == sample(logits, 31, temperature=1.0, seed=7)
    assert first != draws(logits, 50, temperature=1.0, seed=8)
    assert first != draws(logits, 50, temperature=1.0, seed=7 + 2**32)
    assert first != draws(logits, 50, temperature=1.0, seed=7, sequence=1)
    assert first != draws(logits, 50, temperature=1.0, seed=7, sequence=2**32)
    far = [sample(logits, 2**32 + i, temperature=1.0, seed=7) for i in range(50)]
    assert first != far


def test_tokens_of_a_seed_are_the_same_on_every_machine():
    """Of 1000 equals, token = random * 1000: Philox4x32-10 with the position as its counter."""
    logits = torch.zeros(1000)
    expected = [philox_uniform(seed=0, position=p) * 1000 >> 64 for p in range(20)]
    assert draws(logits, 20, temperature=1.0) == expected


def philox_uniform(seed: int, position: int, sequence: int = 0) -> int:
    """64 random bits, from the formulas of the paper."""
    mask = 0xFFFFFFFF
    c = [position & mask, position >> 32, sequence & mask, sequence >> 32]
    k = [seed & mask, seed >> 32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 & mask, p0 >> 32 ^ c[3] ^ k[1], p0 & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return c[1] << 32 | c[0]


def reference(
    logits: torch.Tensor, position: int, temperature, top_k, top_p, min_p, seed, sequence
) -> int:
    """The sampler by its definition: sort, filter, walk. Sums of whole numbers, so none rounds."""
    values = logits.double()
    exponents = (values - values.max()) / temperature
    order = torch.sort(values, descending=True, stable=True).indices.tolist()
    weights = {
        i: int(math.exp(exponents[i]) * 2**40) for i in order[:top_k] if exponents[i] > -27.5
    }
    kept, total = {}, sum(weights.values())
    for i in order:
        if i in weights and sum(kept.values()) < math.ceil(top_p * total):
            kept[i] = weights[i]
    kept = {i: weight for i, weight in kept.items() if weight >= min_p * 2**40}
    threshold = philox_uniform(seed, position, sequence) * sum(kept.values()) >> 64
    for i in sorted(kept):
        if threshold < kept[i]:
            return i
        threshold -= kept[i]
    raise AssertionError("the threshold is below the sum")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # bfloat16: ties everywhere
@pytest.mark.parametrize("temperature", [0.2, 1.0, 4.0])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(900, 1.0, 0), (50, 1.0, 0), (900, 0.9, 0), (300, 0.6, 0), (900, 1.0, 0.2), (40, 0.9, 0.01)],
)
def test_tokens_are_those_of_the_definition(dtype, temperature, top_k, top_p, min_p):
    logits = torch.randn(900, generator=torch.Generator().manual_seed(6)).mul(4).to(dtype)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    options |= {"seed": 9, "sequence": 2**33 + 5}
    for position in range(25):
        expected = reference(logits, position, **options)
        assert sample(logits, position, **options) == expected


def test_the_generator_of_these_tests_gives_the_papers_known_answers():
    """Its own check; the words are those of the reference's kat_vectors."""
    assert philox_uniform(0, 0) == 0xE169C58D_6627E8D5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ([1.0, float("nan"), 2.0], "gave NaN as the logit of token 1 at position 17"),
        ([float("nan")] * 3, "gave NaN as the logit of token 0"),
        ([1.0, math.copysign(math.nan, -1.0)], "gave NaN as the logit of token 1"),
        ([1.0, 2.0, float("inf")], r"gave \+inf as the logit of token 2"),
        ([-math.inf] * 3, "every logit at position 17 is -inf"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_logits_that_no_token_can_be_chosen_from_are_an_error(bad, reason, dtype, temperature):
    with pytest.raises(_native.CudaInt4Error, match=reason):
        sample(torch.tensor(bad, dtype=dtype), 17, temperature=temperature)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"temperature": -0.1}, "temperature: expected a finite number >= 0"),
        ({"temperature": math.nan}, "temperature: expected"),
        ({"temperature": math.inf}, "temperature: expected"),
        ({"top_p": 0.0}, "top_p: expected 0 < top_p <= 1"),
        ({"top_p": 1.5}, "top_p: expected"),
        ({"top_p": math.nan}, "top_p: expected"),
        ({"min_p": -0.1}, "min_p: expected 0 <= min_p <= 1"),
        ({"min_p": 1.1}, "min_p: expected"),
        ({"min_p": math.nan}, "min_p: expected"),
    ],
)
def test_configurations_out_of_range_are_refused(config, reason):
    with pytest.raises(_native.CudaInt4Error, match=reason):
        sample(torch.zeros(3), **config)


def test_tensors_that_are_no_logits_are_refused():
    with pytest.raises(_native.CudaInt4Error, match="float16, bfloat16 or float32, got dtype 4"):
        sample(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(_native.CudaInt4Error, match="expected 1 to 8388608 logits"):
        sample(torch.zeros(0))
    with pytest.raises(_native.CudaInt4Error, match="got no tensor"):
        sample(None)
