"""prune_24_: which weights stay, ties, shared weights, calibration, and refusals."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

from cuda_int4 import prune_24_
from cuda_int4.marlin import Marlin24Int4
from cuda_int4.quantize import Int4Config, quantize_
from cuda_int4.sparse24 import is_24
from messages import folded, message


class Model(nn.Module):
    """A tied embedding and head, linears of several kinds, and one that does not fit."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(40, 64)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)
        self.odd = nn.Linear(64, 10)
        self.tail = nn.Linear(10, 64)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(64, 40, bias=False)
        self.head.weight = self.embedding.weight
        self.to(dtype)

    def forward(self, tokens, shift=0.0):
        x = self.dropout(self.embedding(tokens)) + shift
        x = x + self.down(torch.relu(self.up(x)))
        return self.head(x + self.tail(self.odd(x)))


def tokens(n=8, seed=0) -> torch.Tensor:
    return torch.randint(0, 40, (n, 5), generator=torch.Generator().manual_seed(seed))


def select(*names):
    return lambda module, fqn: fqn in names


def chosen_one_by_one(w: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """What prune_24_ promises, a four at a time."""
    pruned = torch.zeros_like(w)
    for n in range(w.shape[0]):
        for k in range(0, w.shape[1], 4):
            size = w[n, k : k + 4].abs().float()
            score = (size * norms[k : k + 4]).tolist()
            order = sorted(range(4), key=lambda i: (-score[i], -float(size[i]), i))  # noqa: B023
            for i in order[:2]:
                pruned[n, k + i] = w[n, k + i]
    return pruned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_magnitude_keeps_the_two_largest_of_each_four(dtype):
    w = (torch.arange(7 * 32) * 37 % 9 - 4).view(7, 32).to(dtype)  # many ties and zeros
    model = nn.Sequential(nn.Linear(32, 7, dtype=dtype))
    model[0].weight.data = w.clone()
    parameter, bias = model[0].weight, model[0].bias.clone()
    assert prune_24_(model) is model
    assert model[0].weight is parameter and parameter.requires_grad
    assert torch.equal(parameter.data, chosen_one_by_one(w, torch.ones(32)))
    assert torch.equal(model[0].bias, bias) and is_24(parameter)


@pytest.mark.parametrize(
    "four, kept",
    [
        ([1, 1, 1, 1], [1, 1, 0, 0]),
        ([1, -2, 2, 1], [0, -2, 2, 0]),
        ([-1, 0, 1, 1], [-1, 0, 1, 0]),
        ([0, 0, 3, 0], [0, 0, 3, 0]),
        ([1, 2, -1, 1], [1, 2, 0, 0]),
    ],
)
def test_of_equal_weights_the_first_stay(four, kept):
    model = nn.Sequential(nn.Linear(4, 1))
    model[0].weight.data = torch.tensor([four], dtype=torch.float32)
    prune_24_(model)
    assert model[0].weight.tolist() == [kept]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wanda_weighs_features_by_their_norm_over_all_inputs(dtype):
    torch.manual_seed(1)
    layer = nn.Linear(32, 24, dtype=dtype)
    w = layer.weight.detach().clone()
    inputs = [
        (torch.randn(5, 3, 32) * torch.logspace(-2, 2, 32)).to(dtype),
        torch.randn(1, 32).to(dtype),
    ]
    rows = torch.cat([x.reshape(-1, 32) for x in inputs]).double()
    norms = rows.square().sum(0).sqrt().float()
    prune_24_(nn.Sequential(layer), "wanda", [x for x in inputs])
    assert torch.equal(layer.weight.data, chosen_one_by_one(w, norms))
    assert not torch.equal(layer.weight.data, chosen_one_by_one(w, torch.ones(32)))


def test_a_feature_that_is_never_seen_loses_to_those_that_are_and_ties_go_by_size():
    layer = nn.Linear(4, 3, bias=False)
    layer.weight.data = torch.tensor([[9.0, 8, 1, 2], [5, 6, 0, 0], [9.0, 8, 0, 1]])
    prune_24_(nn.Sequential(layer), "wanda", [torch.tensor([[0.0, 0, 1, 1]])])
    # Row 1 is 2:4 already: nothing of it goes, though its features score 0.
    assert layer.weight.tolist() == [[0, 0, 1, 2], [5, 6, 0, 0], [9, 0, 0, 1]]


def test_wanda_has_less_error_than_magnitude_where_features_differ():
    def output_error(method, calibration=None):
        torch.manual_seed(2)
        layer = nn.Linear(256, 128, bias=False).requires_grad_(False)
        size = torch.logspace(-1, 1, 256)[torch.randperm(256)]
        x, fresh = torch.randn(64, 256) * size, torch.randn(64, 256) * size
        dense = layer(fresh)
        prune_24_(nn.Sequential(layer), method, [x] if calibration else None)
        return float((layer(fresh) - dense).square().mean() / dense.square().mean())

    assert output_error("wanda", True) < 0.5 * output_error("magnitude")


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_pruning_again_changes_nothing(method):
    calibration = None if method == "magnitude" else [tokens()]
    model = prune_24_(Model(), method, calibration, select("up", "down"))
    before = {name: p.clone() for name, p in model.named_parameters()}
    prune_24_(model, "magnitude", None, select("up", "down"))
    prune_24_(model, "wanda", [tokens(seed=3)], select("up", "down"))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_rows_are_pruned_in_chunks_that_do_not_matter(monkeypatch):
    whole = prune_24_(Model(), "wanda", [tokens()], select("up", "down"))
    monkeypatch.setattr("cuda_int4.prune._CHUNK_WEIGHTS", 5 * 64)
    chunked = prune_24_(Model(), "wanda", [tokens()], select("up", "down"))
    assert torch.equal(chunked.up.weight, whole.up.weight) and is_24(whole.up.weight)
    assert torch.equal(chunked.down.weight, whole.down.weight)


def test_the_default_prunes_linears_that_fit_and_warns_of_others():
    model, before = Model(), Model()
    with pytest.warns(UserWarning) as warned:
        prune_24_(model)
    assert_expected_inline(
        folded(*str(warned[0].message).split("\n")),
        """\
prune_24_: these linears stay as they are (a filter_fn chooses others):
  tail.weight: expected K % 4 == 0, got K=10; pad K to 12, or leave it out in filter_fn
  head.weight: expected a weight of linears alone, got one that is also embedding.weight, whose
    rows would lose half of their values; untie them, or select it in filter_fn""",
    )
    for name in ("up", "down", "odd"):
        w, dense = getattr(model, name).weight, getattr(before, name).weight
        assert is_24(w) and not is_24(dense)
        assert torch.equal(w[w != 0], dense[w != 0])
    for name in ("embedding", "tail"):
        assert torch.equal(getattr(model, name).weight, getattr(before, name).weight)


def test_a_linear_that_is_quantised_already_is_named_in_the_warning():
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(64, 8))
    quantize_(model, Int4Config(group_size=32), select("0"))
    with pytest.warns(UserWarning, match=r"0.weight: .* quantised already; prune before quantize_"):
        prune_24_(model)
    assert is_24(model[1].weight) and not is_24(model[0].weight.unpack())


def test_a_weight_of_two_linears_counts_the_inputs_of_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 1, bias=False), nn.Linear(4, 1, bias=False)
            self.b.weight = self.a.weight
            self.a.weight.data = torch.tensor([[1.0, 1, 1, 1]])

        def forward(self, x):
            return self.a(x) + self.b(input=x.flip(-1))

    model = prune_24_(Twice(), "wanda", [torch.tensor([[3.0, 0, 1, 0]])])
    assert model.a.weight is model.b.weight
    assert model.a.weight.tolist() == [[1, 0, 0, 1]]  # norms 3, 1, 1, 3


def test_a_tied_head_is_pruned_where_a_filter_says_so():
    model = prune_24_(Model(), filter_fn=select("head"))
    assert model.head.weight is model.embedding.weight and is_24(model.embedding.weight)


@pytest.mark.parametrize(
    "inputs", [tokens(), (tokens(), 0.5), {"tokens": tokens(), "shift": 0.5}], ids=str
)
def test_calibration_is_given_as_the_model_takes_it_and_leaves_no_trace(inputs):
    model = Model().train()
    model.up.eval()
    modes = [module.training for module in model.modules()]
    prune_24_(model, "wanda", iter([inputs]), select("up"))
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.up.weight.grad is None
    # In eval mode: dropout would make each run another.
    again = Model()
    prune_24_(again, "wanda", [inputs], select("up"))
    assert torch.equal(again.up.weight, model.up.weight)


def test_a_calibration_that_fails_leaves_no_trace_either():
    model, before = Model(), Model()
    with pytest.raises(IndexError):
        prune_24_(model, "wanda", [tokens(), tokens() + 100], select("up"))
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.training and torch.equal(model.up.weight, before.up.weight)


def test_a_pruned_model_quantises_and_packs():
    model = Model(torch.bfloat16)
    prune_24_(model, "wanda", [tokens()], select("up", "down"))
    zeros = {name: getattr(model, name).weight == 0 for name in ("up", "down")}
    quantize_(model, Int4Config(32, method="hqq"), select("up", "down"))
    for name, zero in zeros.items():
        weight = getattr(model, name).weight.unpack()
        packed = Marlin24Int4.pack(weight, who=name)
        assert torch.equal(packed.unpack().qdata, weight.qdata)
        assert not weight.dequantize()[zero].any()


# ---- refusals ----


def test_options_that_contradict_each_other_are_refused():
    options = [("random", None), ("wanda", None), ("magnitude", [tokens()])]
    options += [("wanda", tokens()), ("wanda", {"tokens": tokens()})]
    found = [message(prune_24_, Model(), *given) for given in options]
    assert_expected_inline(
        folded(*found),
        """\
prune_24_: expected method in 'magnitude', 'wanda', got 'random'; 'magnitude' needs no
    calibration
prune_24_: expected calibration with method='wanda' and with no other, got none with 'wanda';
    wanda weighs each input feature by what it measures
prune_24_: expected calibration with method='wanda' and with no other, got some with
    'magnitude'; wanda weighs each input feature by what it measures
prune_24_: expected calibration as an iterable of inputs, got one Tensor; write [x] for a single
    input
prune_24_: expected calibration as an iterable of inputs, got one dict; write [x] for a single
    input""",
    )


def test_what_a_filter_selects_must_fit():
    normalised = Model()
    torch.nn.utils.parametrizations.weight_norm(normalised.up)
    spoiled, blown, unreached = Model(), Model(), Model()
    spoiled.up.weight.data[95, 3] = torch.nan
    blown.embedding.weight.data[7, 5] = torch.inf
    unreached.extra = nn.Linear(4, 4)
    int4 = quantize_(Model(), Int4Config(32), select("up"))
    calls = {
        "K": (Model(), "magnitude", None, select("tail")),
        "no linear": (Model(), "magnitude", None, select("embedding")),
        "parametrized": (normalised, "magnitude", None, select("up")),
        "int4": (int4, "magnitude", None, select("up")),
        "meta": (Model().to("meta"), "magnitude", None, select("up")),
        "dtype": (Model(torch.float64), "magnitude", None, select("up")),
        "nan": (spoiled, "magnitude", None, select("down", "up")),
        "inf": (blown, "wanda", [torch.arange(10)], select("up")),
        "unreached": (unreached, "wanda", [tokens()], select("up", "extra")),
        "no inputs": (Model(), "wanda", [], select("up")),
    }
    found = []
    for what, (model, *given) in calls.items():
        before = [p.clone() for p in model.parameters() if not p.is_meta and what != "int4"]
        found.append(f"{what}: " + message(prune_24_, model, *given))
        after = [p for p in model.parameters() if not p.is_meta and what != "int4"]
        assert all(map(torch.equal, map(torch.nan_to_num, before), map(torch.nan_to_num, after)))
    assert_expected_inline(
        folded(*found),
        """\
K: tail.weight: expected K % 4 == 0, got K=10; pad K to 12, or leave it out in filter_fn
no linear: embedding.weight: expected an nn.Linear with a parameter named weight, got Embedding;
    remove parametrizations first, or leave it out in filter_fn
parametrized: up.weight: expected an nn.Linear with a parameter named weight, got
    ParametrizedLinear; remove parametrizations first, or leave it out in filter_fn
int4: up.weight: expected a float weight, got CudaCoalescedInt4Tensor, which is quantised
    already; prune before quantize_, or leave it out in filter_fn
meta: up.weight: expected a weight float16, bfloat16 or float32 with data, got float32 [96, 64]
    on meta; cast or load it, or leave it out in filter_fn
dtype: up.weight: expected a weight float16, bfloat16 or float32 with data, got float64 [96, 64]
    on cpu; cast or load it, or leave it out in filter_fn
nan: up.weight: expected finite weights, got inf or nan; repair the checkpoint
inf: up.weight: expected finite inputs, got inf as the norm of feature 5 over 1 calibration
    inputs; repair the checkpoint, or calibrate in bfloat16
unreached: extra.weight: expected calibration inputs that reach this linear, got none that is
    not 0 of 1; give others, or leave it out in filter_fn
no inputs: up.weight: expected calibration inputs that reach this linear, got none that is not 0
    of 0; give others, or leave it out in filter_fn""",
    )
