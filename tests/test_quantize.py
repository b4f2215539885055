"""quantize_ and prepare_: errors of both methods, which layers change, ties, and refusals."""

import pytest
import torch
from executorch.extension.llm.export.gguf import ExportableGGUFTensor
from executorch.extension.llm.export.int4 import ExportableInt4Tensor
from expecttest import assert_expected_inline
from torch import nn
from torchao.quantization import Int4Tensor, IntxUnpackedToInt8Tensor, IntxWeightOnlyConfig
from torchao.quantization import quantize_ as torchao_quantize_
from torchao.quantization.granularity import PerGroup

import cases
from cuda_int4.quantize import Int4Config, prepare_, quantize_, quantize_weight
from cuda_int4.tensors import CudaCoalescedInt4Tensor
from messages import folded, message


def heavy_tailed(N=64, K=512, dtype=torch.float32) -> torch.Tensor:
    """Student-t with 3 degrees of freedom, off centre: rows that min-max does badly on."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(4, N, K, generator=generator)
    return (0.02 * (normal[0] / (normal[1:] ** 2).mean(0).sqrt() + 0.3)).to(dtype)


def errors(w: torch.Tensor, packed: CudaCoalescedInt4Tensor) -> torch.Tensor:
    """|error| of each weight, [N, n_groups, group_size]."""
    error = (packed.dequantize(torch.float64) - w.double()).abs()
    return error.view(w.shape[0], -1, packed.group_size)


class Model(nn.Module):
    """A tied embedding and head, linears of several kinds, and one that does not fit."""

    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        self.embedding = nn.Embedding(40, 64)
        self.block = nn.ModuleDict({"up": nn.Linear(64, 96), "down": nn.Linear(96, 64)})
        self.odd = nn.Linear(20, 64)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 40, bias=False)
        self.head.weight = self.embedding.weight
        self.to(dtype)


def kinds(model: nn.Module) -> dict[str, str]:
    return {name: type(p).__name__ for name, p in model.named_parameters(remove_duplicate=False)}


# ---- solvers ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", ["min_max", "hqq"])
def test_min_max_error_is_within_its_step_and_hqq_is_nowhere_worse(
    method, symmetric, group_size, dtype
):
    w = heavy_tailed(8, 512, dtype)
    packed = quantize_weight(w, Int4Config(group_size, symmetric, method))
    assert packed.group_size == (512 if group_size == -1 else group_size)
    assert (packed.scale.dtype, packed.dtype) == (dtype, dtype)
    assert (packed.zero_point is None) == symmetric
    if method == "min_max":
        # Half a step where nothing is cut; -max/8 cuts at most one step; bf16 moves a zero point.
        step = packed.scale.double().abs()
        z = torch.tensor(0.0) if symmetric else packed.zero_point.double().abs()
        slack = 2**-7 * z
        bound = step * ((1.01 if symmetric else 0.55) + slack)
        assert (errors(w, packed).amax(-1) <= bound).all()
    else:
        base = errors(w, quantize_weight(w, Int4Config(group_size, symmetric)))
        ours = errors(w, packed)
        assert ((ours**0.75).mean(-1) <= (base**0.75).mean(-1) * (1 + 1e-5)).all()
        assert ((ours**2).mean(-1) <= (base**2).mean(-1) * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    "symmetric, norm_gain, square_gain", [(True, 0.95, 0.98), (False, 0.95, 0.92)]
)
def test_hqq_beats_min_max_on_heavy_tails(symmetric, norm_gain, square_gain):
    w = heavy_tailed()
    base, ours = (
        errors(w, quantize_weight(w, Int4Config(64, symmetric, method)))
        for method in ("min_max", "hqq")
    )
    assert (ours**0.7).mean() < norm_gain * (base**0.7).mean()
    assert (ours**2).mean() < square_gain * (base**2).mean()


def test_symmetric_min_max_beats_both_of_its_formulas():
    w = heavy_tailed()
    groups = w.view(64, -1, 64)
    m = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    packed = errors(w, quantize_weight(w, Int4Config(64))).square().mean()
    for scale in (m.abs() / 7, -m / 8):
        rounded = (groups / scale).round().clamp(-8, 7) * scale
        assert packed < (rounded - groups).square().mean()


@pytest.mark.parametrize("method", ["min_max", "hqq"])
@pytest.mark.parametrize("value", [0.0, 0.1, -3.0])
def test_an_asymmetric_group_of_one_value_is_exact(method, value):
    w = heavy_tailed(4, 64, torch.bfloat16)
    w[2, :32] = value
    packed = quantize_weight(w, Int4Config(32, symmetric=False, method=method))
    assert torch.equal(packed.dequantize()[2, :32], w[2, :32].float())


@pytest.mark.parametrize("method", ["min_max", "hqq"])
def test_a_symmetric_group_of_zeros_is_zero(method):
    w = heavy_tailed(4, 64)
    w[1] = 0
    packed = quantize_weight(w, Int4Config(32, method=method))
    assert not packed.dequantize()[1].any() and packed.dequantize()[0].any()


def test_weights_that_int4_holds_come_back_unchanged():
    _, weight = cases.Case(1, 33, 384, 128).make(seed=0)
    w = weight.dequantize()
    assert (w == -8 * weight.scale.float().repeat_interleave(128, dim=1)).any(-1).all()
    assert torch.equal(quantize_weight(w, Int4Config(128)).dequantize(), w)


def test_rows_are_quantised_in_chunks_that_do_not_matter(monkeypatch):
    w, config = heavy_tailed(13, 128), Int4Config(64, symmetric=False)
    whole, done = quantize_weight(w, config), []
    monkeypatch.setattr("cuda_int4.quantize._CHUNK_WEIGHTS", 5 * 128)
    chunked = quantize_weight(w, config, advance=done.append)
    assert done == [5 * 128, 5 * 128, 3 * 128]
    for name in ("qdata", "scale", "zero_point"):
        assert torch.equal(getattr(chunked, name), getattr(whole, name))


def test_scales_take_the_dtype_that_is_asked_for():
    packed = quantize_weight(heavy_tailed(4, 64), Int4Config(32, scale_dtype=torch.float16))
    assert (packed.scale.dtype, packed.dtype) == (torch.float16, torch.float32)


@pytest.mark.parametrize("method", ["min_max", "hqq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_that_vanish_or_overflow_are_refused(method, symmetric):
    config = Int4Config(32, symmetric, method, scale_dtype=torch.float16)
    normal = heavy_tailed(4, 64)
    tiny, huge = (torch.cat([normal, normal * factor]) for factor in (1e-9, 1e9))
    assert_expected_inline(
        folded(*(message(quantize_weight, weight, config) for weight in (tiny, huge))),
        """\
weight: expected scales within the range of torch.float16, got 0 for weights that are not; leave
    scale_dtype out, or take torch.bfloat16
weight: expected scales within the range of torch.float16, got inf; leave scale_dtype out, or
    take torch.bfloat16""",
    )
    quantize_weight(torch.cat([normal, torch.zeros(1, 64)]), config)


# ---- quantize_ ----


def test_quantize_changes_linears_that_fit_and_warns_of_others():
    model = Model()
    bias = model.block["up"].bias
    with pytest.warns(UserWarning) as warned:
        assert quantize_(model, Int4Config(32, activation="int8")) is model
    assert_expected_inline(
        folded(*str(warned[0].message).split("\n")),
        """\
quantize_: these linears stay float (a filter_fn chooses others):
  odd.weight: expected K % 32 == 0, got K=20, group_size=32; pad K to 32""",
    )
    int4 = {name for name, kind in kinds(model).items() if kind == "CudaCoalescedInt4Tensor"}
    assert int4 == {"embedding.weight", "head.weight", "block.up.weight", "block.down.weight"}
    assert model.block["up"].bias is bias
    assert model.head.weight.activation == "int8" and not model.head.weight.requires_grad


def test_a_weight_that_is_shared_stays_shared():
    model = Model()
    w = model.head.weight.detach().clone()
    quantize_(model, Int4Config(32), lambda module, fqn: fqn == "head")
    assert model.head.weight is model.embedding.weight
    tokens = torch.tensor([[3, 39, 0]])
    expected = quantize_weight(w, Int4Config(32)).dequantize().bfloat16()[tokens]
    assert torch.equal(model.embedding(tokens), expected)


def test_the_filter_sees_modules_and_names():
    model, seen = Model(), []

    def up_only(module, fqn):
        seen.append(fqn)
        return isinstance(module, nn.Linear) and fqn.endswith("up")

    quantize_(model, Int4Config(32), up_only)
    assert seen == [fqn for fqn, _ in model.named_modules()]
    int4 = {name for name, kind in kinds(model).items() if kind == "CudaCoalescedInt4Tensor"}
    assert int4 == {"block.up.weight"}


def test_quantizing_again_changes_nothing():
    model = quantize_(Model(), Int4Config(32), lambda module, fqn: fqn == "block.up")
    before = model.block["up"].weight
    quantize_(model.block, Int4Config(32))
    assert model.block["up"].weight is before
    assert isinstance(model.block["down"].weight, CudaCoalescedInt4Tensor)


def test_multihead_attention_stays_float():
    model = nn.MultiheadAttention(64, 4)
    quantize_(model, Int4Config(32))
    assert "CudaCoalescedInt4Tensor" not in kinds(model).values()


def select(*names):
    return lambda module, fqn: fqn in names


def test_what_a_filter_selects_must_fit():
    normalised = Model()
    torch.nn.utils.parametrizations.weight_norm(normalised.block["up"])
    capped = Model()
    capped.embedding.max_norm = 1.0
    spoiled = Model()
    spoiled.block["up"].weight.data[95, 3] = torch.inf
    done = quantize_(Model(), Int4Config(32), select("head"))
    calls = {
        "K": (Model(), Int4Config(32), select("odd")),
        "group_size": (Model(), Int4Config(64), select("block.up", "block.down")),
        "one per row": (Model(), Int4Config(-1), select("odd")),
        "no linear": (Model(), Int4Config(32), select("norm")),
        "no weight": (Model(), Int4Config(32), select("block")),
        "parametrized": (normalised, Int4Config(32), select("block.up")),
        "int4 already": (done, Int4Config(32), select("head")),
        "meta": (Model().to("meta"), Int4Config(32), select("head")),
        "max_norm": (capped, Int4Config(32), select("head")),
        "inf": (spoiled, Int4Config(32), select("block.up")),
    }
    found = [
        f"{what}: " + message(quantize_, *args, error=(ValueError, NotImplementedError))
        for what, args in calls.items()
    ]
    assert_expected_inline(
        folded(*found),
        """\
K: odd.weight: expected K % 32 == 0, got K=20, group_size=32; pad K to 32
group_size: block.down.weight: expected K % 64 == 0, got K=96, group_size=64; pick group_size
    32, or pad K to 128
one per row: odd.weight: expected K % 32 == 0, got K=20, group_size=20; pad K to 32
no linear: norm.weight: expected a weight float16, bfloat16 or float32 [N, K] with data, got
    bfloat16 [64] on cpu; cast or load it, or leave it out in filter_fn
no weight: block.weight: expected a module with a parameter named weight, got ModuleDict; remove
    parametrizations first, or leave it out in filter_fn
parametrized: block.up.weight: expected a module with a parameter named weight, got
    ParametrizedLinear; remove parametrizations first, or leave it out in filter_fn
int4 already: head.weight: expected a float weight, got CudaCoalescedInt4Tensor, which is
    quantised already; use prepare_ for int4 weights, or leave it out in filter_fn
meta: head.weight: expected a weight float16, bfloat16 or float32 [N, K] with data, got bfloat16
    [40, 64] on meta; cast or load it, or leave it out in filter_fn
max_norm: embedding.weight: expected an embedding without max_norm, got max_norm=1.0, which
    rewrites the weight; leave this embedding float
inf: block.up.weight: expected finite weights, got inf or nan in rows 0..95; repair the
    checkpoint""",
    )


def test_shapes_are_checked_before_the_first_weight_changes():
    model = Model()
    before = kinds(model)
    with pytest.raises(ValueError, match="odd.weight"):
        quantize_(model, Int4Config(32), lambda module, fqn: isinstance(module, nn.Linear))
    assert kinds(model) == before


@pytest.mark.parametrize(
    "options",
    [
        {"group_size": 16},
        {"group_size": 0},
        {"method": "gptq"},
        {"activation": "fp8"},
        {"layout": "plain.v1"},
        {"layout": "fast"},
        {"scale_dtype": torch.float64},
    ],
    ids=str,
)
def test_a_config_that_fits_no_weight_is_refused(options):
    found = message(Int4Config, **options)
    assert "expected" in found and str(next(iter(options.values()))) in found


# ---- prepare_ ----


def q4_k(N: int, K: int) -> ExportableGGUFTensor:
    raw = torch.randint(0, 256, (N, K // 256, 144), dtype=torch.uint8)
    raw[..., 1], raw[..., 3] = 0x20, 0x1C  # d and dmin: finite, small
    return ExportableGGUFTensor.from_raw(raw.reshape(N, -1), "q4_k")


def test_prepare_converts_every_kind_of_int4_weight_and_leaves_others():
    native = cases.Case(1, 48, 256, 64, "native", "fractional").source(1)
    executorch = cases.Case(1, 48, 256, 128, "executorch", "integer").source(2)
    intx = nn.Linear(256, 48)
    torchao_quantize_(intx, IntxWeightOnlyConfig(torch.int4, PerGroup(32)))
    int8 = nn.Linear(256, 48)
    torchao_quantize_(int8, IntxWeightOnlyConfig(torch.int8, PerGroup(32)))
    sources = {
        "native": native,
        "executorch": executorch,
        "exportable": ExportableInt4Tensor.from_int4_tensor(executorch),
        "gguf": q4_k(48, 256),
        "intx": intx.weight,
        "int8": int8.weight,
        "dense": nn.Linear(256, 48).weight,
        "ours": CudaCoalescedInt4Tensor.from_int4(native),
    }
    model = nn.ModuleDict({name: nn.Linear(256, 48) for name in sources})
    for name, source in sources.items():
        model[name].weight = nn.Parameter(source, requires_grad=False)
    kept = {name: model[name].weight for name in ("int8", "dense", "ours")}
    assert prepare_(model, activation="int8") is model
    for name, weight in kept.items():
        assert model[name].weight is weight
    for name in ("native", "executorch", "exportable", "gguf", "intx"):
        weight = model[name].weight
        assert isinstance(weight, CudaCoalescedInt4Tensor) and weight.activation == "int8"
        expected = CudaCoalescedInt4Tensor.from_int4(sources[name])
        assert torch.equal(weight.dequantize(), expected.dequantize())
    assert isinstance(model["int8"].weight, IntxUnpackedToInt8Tensor)


def test_prepare_keeps_ties_buffers_and_embeddings():
    class Own(nn.Module):
        """A module of the user's, with its int4 weight in a buffer."""

        def __init__(self, weight):
            super().__init__()
            self.register_buffer("table", weight)

    source = cases.Case(1, 40, 64, 32, "executorch", "integer").source(0)
    model = Model()
    model.head.weight = model.embedding.weight = nn.Parameter(source, requires_grad=False)
    model.own = Own(cases.Case(1, 40, 64, 32, "native", "fractional").source(1))
    prepare_(model)
    assert model.head.weight is model.embedding.weight
    assert isinstance(model.own._buffers["table"], CudaCoalescedInt4Tensor)
    table = cases.definition(source).bfloat16()
    assert torch.equal(model.embedding(torch.tensor([7, 39])), table[[7, 39]])


def test_prepare_takes_a_stated_convention_and_a_scale_dtype():
    source = cases.Case(1, 40, 64, 32, "native", "integer").source(0)
    mislabelled = Int4Tensor(
        source.qdata.view(torch.uint8), source.scale, source.zero_point, [1, 32], source.shape
    )
    model = Model()
    model.head.weight = nn.Parameter(mislabelled, requires_grad=False)
    model.odd = nn.Linear(256, 4)
    model.odd.weight = nn.Parameter(q4_k(4, 256), requires_grad=False)
    prepare_(model, convention="native", scale_dtype=torch.bfloat16)
    assert torch.allclose(
        model.head.weight.dequantize(torch.float64), cases.definition(source), rtol=2**-7, atol=1e-3
    )
    assert model.odd.weight.scale.dtype == torch.bfloat16


def test_prepare_names_the_layer_that_it_refuses():
    def with_weight(weight) -> nn.Module:
        model = Model()
        model.block["up"].weight = nn.Parameter(weight, requires_grad=False)
        return model

    source = cases.Case(1, 96, 64, 32).source(0)
    capped = Model()
    capped.embedding = nn.Embedding(96, 64, max_norm=2.0)
    capped.embedding.weight = nn.Parameter(source, requires_grad=False)
    bag = nn.EmbeddingBag(96, 64)
    bag.weight = nn.Parameter(source, requires_grad=False)
    broken = Int4Tensor(source.qdata, source.scale[:1], source.zero_point, [1, 32], source.shape)
    q6_k = ExportableGGUFTensor(torch.zeros(2, 210, dtype=torch.uint8), "q6_k", torch.bfloat16)
    models = [with_weight(broken), with_weight(q6_k), capped, bag]
    found = [message(prepare_, model, error=(ValueError, NotImplementedError)) for model in models]
    found.append(message(prepare_, Model(), activation="fp8"))
    assert_expected_inline(
        folded(*found),
        """\
block.up.weight: expected scale [n_groups, N] = [2, 96], got bfloat16 [1, 96]; the weight
    contradicts its block_size or shape
block.up.weight: expected a GGUF tensor of type q4_k, got q6_k; quantise it to Q4_K, or
    dequantise it and quantise again with quantize_
embedding.weight: expected an embedding without max_norm, got max_norm=2.0, which rewrites the
    weight; leave this embedding float
weight: expected an int4 weight in nn.Linear or nn.Embedding, got it in EmbeddingBag; leave this
    layer float
prepare_: expected activation in ('none', 'int8') and scale_dtype None or one of (torch.float16,
    torch.bfloat16, torch.float32), got 'fp8' and None; choose one of them""",
    )


def test_prepare_changes_nothing_if_it_refuses_anything():
    def sources(last) -> nn.Module:
        model = Model()
        model.block["up"].weight = nn.Parameter(sparse, requires_grad=False)
        model.block["down"].weight = nn.Parameter(last, requires_grad=False)
        return model

    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (96, 64), generator=generator, dtype=torch.int8)
    codes[:, 0::4] = codes[:, 1::4] = 0

    def unpacked(values) -> IntxUnpackedToInt8Tensor:
        N, K = values.shape
        return IntxUnpackedToInt8Tensor(
            values, torch.rand(N, K // 32) + 0.5, torch.zeros(N, K // 32, dtype=torch.int8),
            torch.int4, (1, 32), torch.bfloat16, None,
        )  # fmt: skip

    sparse, dense = unpacked(codes), unpacked(codes.roll(1, 1).flip(0)[:64].repeat(1, 2)[:, :96])
    dense_codes = dense.qdata
    dense_codes[5, 4:8] = 3
    model = sources(dense)
    before = kinds(model)
    found = message(prepare_, model, layout="marlin24")
    assert found.startswith("block.down.weight: expected") and kinds(model) == before
    dense_codes[5, 4:8] = torch.tensor([0, 3, 3, 0])
    prepare_(model, layout="marlin24")
    assert (
        kinds(model)["block.up.weight"]
        == kinds(model)["block.down.weight"]
        == ("CudaMarlin24Int4Tensor")
    )
