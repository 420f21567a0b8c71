"""Tracing: which channels meet, what is lost from sight, and the layouts that follow from it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch.nn.attention.flex_attention import flex_attention

from cases import Case, places
from matta.errors import TracingError
from matta.nesting.channels import Channels
from matta.nesting.dimensions import Part, Trace
from matta.nesting.layout import Segment
from matta.nesting.matching import trace_layouts
from matta.nesting.tracing import trace
from zoo import CASES


class Through(nn.Module):
    """Eight channels through a function, between two layers."""

    def __init__(self, function: Callable[[Tensor], Tensor], size: int = 8) -> None:
        super().__init__()
        self.entry, self.head, self.function = nn.Linear(3, 8), nn.Linear(size, 2), function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.entry(x)))


def parts_of(found: Trace, name: str, axis: int) -> tuple[Part, ...]:
    return found.axes[name, axis]


def filled(shape: tuple[int, ...], fill: Callable[[Tensor], object]) -> Tensor:
    target = torch.zeros(shape)
    fill(target)
    return target


def packed_and_back(x: Tensor) -> Tensor:
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([x.shape[1]]), batch_first=True)
    return nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)[0]


def nearest(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return score - (query - key).abs()


@torch.compile(backend="eager", fullgraph=True)
def compiled(x: Tensor) -> Tensor:
    return 2 * x.relu()


ROWS = torch.tensor([1, 0])
FOLLOWED: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "in place": lambda x: x.mul_(2).relu_(),
    "hardswish": F.hardswish,
    "log sigmoid": F.logsigmoid,
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "softmax": lambda x: x.softmax(-1) + x.log_softmax(-1),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "functional norms": lambda x: F.layer_norm(x, x.shape[-1:]) + F.rms_norm(x, x.shape[-1:]),
    "standard score": lambda x: (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True),
    "cumulative": lambda x: x.cumsum(0),
    "type": lambda x: x.double().to(torch.float32).clone().contiguous(),
    "transposes": lambda x: x.t().unsqueeze(0).permute(2, 0, 1).squeeze(1).movedim(1, 0).mT,
    "transposes in place": lambda x: x.clone().t_().transpose_(0, 1).unsqueeze_(1).squeeze_(1),
    "rows": lambda x: x[ROWS] + x.flip(0) + x.index_select(0, ROWS) + x.roll(1, 0),
    "masked rows": lambda x: x[torch.tensor([True, False])].expand(2, -1),
    "gathered rows": lambda x: x.gather(0, ROWS[:, None].expand(-1, 8)),
    "repeat": lambda x: x.repeat(2, 1)[:2] + x.repeat_interleave(2, 0)[::2],
    "padding": lambda x: F.pad(x, (0, 0, 1, 1))[1:-1] + F.pad(x, (0, 3), value=1.0)[:, :8],
    "where": lambda x: torch.where(x > 0, x, 0.1 * x).masked_fill(x > 3, 0.0),
    "stack": lambda x: torch.stack([x, -x], dim=1).amax(1) + torch.stack([x, -x]).max(0).values,
    "masked in place": lambda x: x.clone().masked_fill_(x > 3, 0.0),
    "views of rows": lambda x: filled((2, 8), lambda y: (y[0].copy_(x[0]), y[1:].copy_(x[1:]))),
    "rows put": lambda x: filled((2, 8), lambda y: y.__setitem__(ROWS, x)),
    "rows copied": lambda x: filled((2, 8), lambda y: y.copy_(x)),
    "rows added": lambda x: filled((2, 8), lambda y: y.index_add_(0, ROWS, x)),
    "scattered": lambda x: torch.zeros(2, 8).scatter_add(0, ROWS[:, None].expand(-1, 8), x),
    "fourier of places": lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=0), n=2, dim=0) + torch.fft.fft(x, dim=0).real,
    "masked places": lambda x: x.masked_select(torch.ones(2, 1, dtype=torch.bool)).view(2, 8),
    "packed": lambda x: packed_and_back(x[None]).flatten(0, 1),
    "cut and joined": lambda x: torch.cat([x[:1], x[1:]]),
    "einsum": lambda x: torch.einsum("bc,db->dc", x, torch.eye(2)),
    "baddbmm": lambda x: torch.baddbmm(torch.ones(1), torch.ones(1, 2, 2), x[None])[0],
    "pooling": lambda x: F.max_pool1d(F.avg_pool1d(x[:, :, None].expand(-1, -1, 4), 2), 2).squeeze(-1),
    "pooling beside them": lambda x: F.avg_pool2d(F.max_pool2d(x[:, None, None].expand(-1, -1, 4, -1), (2, 1)), (2, 1))[
        :, 0, 0
    ],
    "kernels of length one": lambda x: F.conv2d(x[:, None, None].expand(-1, -1, 3, -1), torch.ones(1, 1, 3, 1))[
        :, 0, 0
    ],
    "resampling": lambda x: F.interpolate(x[:, :, None], scale_factor=2.0).sum(-1),
    "attention over rows": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None])[0],
    "distance": lambda x: x * (x * x).sum(-1, keepdim=True) + (x @ x.T) @ x,
    "largest of all": lambda x: x / x.max() + x * x.min(),
    "complex numbers": lambda x: torch.view_as_real(torch.polar(x.abs(), x).conj() * torch.complex(x, x)).sum(-1),
    "distances": lambda x: torch.cdist(x.t(), torch.ones(3, 2)).t()[:2] + torch.cdist(torch.ones(2, 2), x.t()),
    "flexible attention": lambda x: flex_attention(*(x[None, None],) * 3, score_mod=nearest)[0, 0],
    "a condition": lambda x: torch.cond(torch.tensor(True), torch.relu, torch.neg, (x,)),
    "compiled": lambda x: compiled(x),
    "solved": lambda x: torch.linalg.solve_triangular(torch.eye(2), x, upper=False),
    "solved from the right": lambda x: torch.linalg.solve_triangular(torch.eye(2), x.T, upper=False, left=False).T,
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_channels_stay_in_sight(name: str) -> None:
    found = trace(Through(FOLLOWED[name]), (torch.ones(2, 3), None))
    [part] = parts_of(found, "entry.weight", 0)
    assert parts_of(found, "head.weight", 1) == (part,)
    assert part.size == 8
    assert found.dimensions[part.dimension].problem is None


LOST: dict[str, tuple[Callable[[Tensor], Tensor], int, str]] = {
    "heads": (lambda x: x.view(2, 2, 4).transpose(1, 2).reshape(2, 8), 8, "them into 2 x 4|merges their axis"),
    "heads merged": (lambda x: x.view(2, 4, 2).softmax(1).flatten(1), 8, "splits 8 of them into 4 x 2"),
    "sorted": (lambda x: x.sort(-1).values, 8, "reordered by 'sort'"),
    "top": (lambda x: x.topk(4, -1).values, 4, "reordered by 'topk'"),
    "picked": (lambda x: x[:, 0:1] + x[:, 1, None], 1, "picks one of 8"),
    "gathered": (lambda x: x.gather(1, torch.zeros(2, 5, dtype=torch.long)), 5, "picked by data"),
    "fourier": (lambda x: torch.fft.fft(x).real, 8, "through the operator"),
    "kronecker": (lambda x: torch.linalg.matrix_exp(x.T @ x)[:2], 8, "through the operator"),
    "a loop": (lambda x: scan(lambda before, y: (y, y + before), x[0], x)[1], 8, "through the operator 'scan'"),
    "unknown in place": (lambda x: x.clone().exponential_(), 8, "through the operator 'exponential'"),
}


@pytest.mark.parametrize("name", LOST)
def test_channels_lost_from_sight_are_said_to_be(name: str) -> None:
    function, size, message = LOST[name]
    found = trace(Through(function, size), (torch.ones(2, 3), None))
    for key in (("entry.weight", 0), ("head.weight", 1)) if size > 1 else (("entry.weight", 0),):
        problems = [found.dimensions[part.dimension].problem for part in found.axes[key]]
        assert any(re.search(message, problem or "") for problem in problems), problems


@pytest.mark.parametrize(
    ("function", "size", "sizes"),
    [
        (lambda x: x[:, :3] * x[:, 3:6], 3, [(3, 1), (3, 1), (2, 1)]),
        (lambda x: torch.cat([x, x], -1), 16, [(8, 1)]),
        (F.glu, 4, [(4, 1), (4, 1)]),
        (lambda x: x[:, :6], 6, [(6, 1), (2, 1)]),
        (lambda x: x.repeat_interleave(3, 1), 24, [(8, 1)]),
        (lambda x: torch.stack([x, x], -1).flatten(1), 16, [(8, 1)]),
        (lambda x: x[:, [-1]] * x[:, :-1], 7, [(7, 1), (1, 1)]),
    ],
)
def test_an_axis_is_cut_where_its_channels_part(
    function: Callable[[Tensor], Tensor], size: int, sizes: list[tuple[int, int]]
) -> None:
    found = trace(Through(function, size), (torch.ones(2, 3), None))
    assert [(part.size, part.repeat) for part in parts_of(found, "entry.weight", 0)] == sizes
    read = {part.dimension for part in parts_of(found, "head.weight", 1)}
    assert read <= {part.dimension for part in parts_of(found, "entry.weight", 0)}


@pytest.mark.parametrize(
    ("function", "size", "factors"),
    [
        (lambda x: F.conv1d(x[:, :, None], torch.ones(8, 4, 1), groups=2)[..., 0], 8, [2, 4]),
        (lambda x: F.conv_transpose1d(x[:, :, None], torch.ones(8, 4, 1), groups=2)[..., 0], 8, [2, 4]),
        (lambda x: F.pixel_shuffle(x[:, :, None, None], 2).mean((2, 3)), 2, [2, 4]),
        (lambda x: F.unfold(x.view(2, 2, 4, 1), (4, 1)).flatten(1), 8, [2, 4]),
        (lambda x: x.view(4, 4).view(2, 8), 8, [2, 4]),
    ],
)
def test_groups_places_and_views_into_the_batch_are_products(
    function: Callable[[Tensor], Tensor], size: int, factors: list[int]
) -> None:
    found = trace(Through(function, size), (torch.ones(2, 3), None))
    [part] = parts_of(found, "entry.weight", 0)
    dimension = found.dimensions[part.dimension]
    assert [sum(each.size * each.repeat for each in factor) for factor in dimension.factors] == factors
    assert not dimension.is_lost


def test_what_repeats_along_a_product_is_one_of_its_factors() -> None:
    channels = Channels()
    one, two = channels.new(2), channels.new(3)
    whole = channels.merge((one, two))
    inner = channels.new(3)
    assert channels.tie(inner.repeat(2), whole) is whole
    assert torch.equal(channels.classes(inner), channels.classes(two))
    assert len(channels.classes(whole).unique()) == 6


def test_products_agree_in_the_finest_shape_of_both() -> None:
    halves = Through(lambda x: x.view(2, 4, 2).flatten(1) + x.view(2, 2, 4).flatten(1))
    found = trace(halves, (torch.ones(2, 3), None))
    [part] = parts_of(found, "entry.weight", 0)
    first, second = found.dimensions[part.dimension].factors
    assert [len(found.dimensions[each.dimension].factors) for each in (*first, *second)] in ([2, 0], [0, 2])


def test_a_shuffle_leaves_no_stretch_to_grow() -> None:
    found = trace(Through(lambda x: x.view(2, 8, 1).view(2, 8).flip(1)), (torch.ones(2, 3), None))
    assert [part.size for part in parts_of(found, "entry.weight", 0)] == [1] * 8


class Interaction(nn.Module):
    """DLRM: dot products of all pairs of embeddings and a dense projection."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.dense = nn.Embedding(5, 4), nn.Embedding(6, 4), nn.Linear(3, 4)
        self.head = nn.Linear(4 + 3, 1)

    def forward(self, first: Tensor, second: Tensor, dense: Tensor) -> Tensor:
        bottom = self.dense(dense)
        stacked = torch.stack([self.first(first), self.second(second), bottom], dim=1)
        products = torch.bmm(stacked, stacked.transpose(1, 2))
        i, j = torch.triu_indices(3, 3, offset=1)
        return self.head(torch.cat([bottom, products[:, i, j]], dim=1))


def test_dot_products_tie_what_they_sum_over() -> None:
    found = trace(Interaction(), ((torch.tensor([0, 1]), torch.tensor([2, 3]), torch.ones(2, 3)), None))
    [part] = found.outputs["dense"]
    assert found.outputs["first"] == found.outputs["second"] == (part,)
    assert parts_of(found, "head.weight", 1)[0] == part
    assert found.describe(part.dimension) == (
        "first.weight (axis 1), second.weight (axis 1), dense.weight (axis 0), dense.bias (axis 0), "
        "head.weight (axis 1)"
    )


class Mixer(nn.Module):
    """A block of an MLP-Mixer: layers over patches and layers over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 4, 2, 2)
        self.tokens = nn.Sequential(nn.Linear(9, 5), nn.GELU(), nn.Linear(5, 9))
        self.channels = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = x + self.tokens(x.mT).mT
        return self.head((x + self.channels(x)).mean(1))


def test_layers_over_another_axis_pass_channels_on() -> None:
    found = trace(Mixer(), (torch.ones(2, 1, 6, 6), None))
    [stream] = found.outputs["patches"]
    assert parts_of(found, "head.weight", 1) == parts_of(found, "channels.2.weight", 0) == (stream,)
    [hidden] = found.outputs["tokens.0"]
    assert parts_of(found, "tokens.2.weight", 1) == (hidden,) != (stream,)


def test_inputs_and_outputs_are_marked() -> None:
    found = trace(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), {"input": torch.ones(5, 3)})
    marks = {axis: [(d.is_input, d.is_output) for d in found.dimensions if axis in d.members]
             for axis in (("0.weight", 1), ("0.weight", 0), ("1.weight", 0))}  # fmt: skip
    assert list(marks.values()) == [[(True, False)], [(False, False)], [(False, True)]]
    assert found.output_shapes == (torch.Size([5, 2]),)


def test_inputs_of_modules_are_the_axes_that_their_weights_sum_over() -> None:
    found = trace(nn.Sequential(nn.Linear(3, 4), nn.Flatten(), nn.Linear(8, 2)), (torch.ones(5, 2, 3), None))
    assert found.inputs["2", 0, 1] == parts_of(found, "2.weight", 1)
    assert ("1", 0, 2) in found.inputs


def test_leaves_the_module_and_torch_as_they_were() -> None:
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 4))
    before, random = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    kernels = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    trace(module, (torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), None))
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert module.training
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.modules())
    assert torch.equal(random, torch.get_rng_state())
    assert kernels == (torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled)
    with pytest.raises(TracingError, match="fails on the example with RuntimeError"):
        trace(module, (torch.ones(5, 4), None))
    assert kernels == (torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled)


def test_modules_without_channels_have_no_dimensions() -> None:
    assert trace(nn.ReLU(), (torch.ones(2, 3), None)).dimensions == ()
    assert trace(nn.Linear(1, 1), (torch.ones(2, 1), None)).dimensions == ()


def test_wide_layers_are_no_harder() -> None:
    module = nn.Sequential(nn.Linear(64, 4096), nn.LayerNorm(4096), nn.ReLU(), nn.Linear(4096, 64))
    [part] = trace(module, (torch.ones(4, 64), None)).outputs["0"]
    assert part.size == 4096


ONE_CHANNEL = ("llama_gqa-head_dim", "gpt_neox-d_model-head_dim-depth")  # rotary halves that are no axis to follow
WIDER = [case for case in CASES if "depth-" not in case.id and case.id not in ONE_CHANNEL]


@pytest.mark.parametrize("case", WIDER, ids=lambda case: case.id)
def test_layouts_say_where_the_student_lives(case: Case) -> None:
    """Against the places that are written out by hand, for all parameters that the trace speaks of."""
    student, ta = case.build()
    layouts, by_hand = trace_layouts(student, ta, case.batch()), places(case, student, ta)
    targets = dict(ta.named_parameters(remove_duplicate=False))
    for name, layout in layouts.items():
        if name not in by_hand:
            continue
        shapes = zip(student.get_parameter(name).shape, targets[by_hand[name].name].shape, strict=True)
        found = [layout.resolve(axis, *sizes).positions() for axis, sizes in enumerate(shapes)]
        assert found == [axis.tolist() for axis in by_hand[name].axes], name


@pytest.mark.parametrize("name", ["cnn-channels-flatten", "lstm-bidirectional", "dlrm-concat", "swiglu_fused-d_model"])
def test_layouts_leave_nothing_out_where_all_is_in_sight(name: str) -> None:
    [case] = [case for case in CASES if case.id == name]
    student, ta = case.build()
    shapes = {name: parameter.shape for name, parameter in ta.named_parameters()}
    grown = {key for key, parameter in student.named_parameters() if shapes[key] != parameter.shape}
    assert trace_layouts(student, ta, case.batch()).keys() == grown


def test_layouts_of_heads_are_products() -> None:
    [case] = [case for case in CASES if case.id == "gpt2-d_model-head_dim"]
    student, ta = case.build()
    layouts = trace_layouts(student, ta, case.batch())
    assert layouts["transformer.h.0.attn.c_attn.weight"].axes[1] == (Segment((2, 2), (2, 3)),) * 3
    assert layouts["transformer.h.0.attn.c_proj.weight"].axes[0] == (Segment((2, 2), (2, 3)),)


def test_refuses_axes_of_other_parts() -> None:
    student = Through(lambda x: torch.cat([x, x], -1), 16)
    ta = Through(lambda x: torch.cat([x, x, x], -1), 24)
    with pytest.raises(TracingError, match=r"axis 1 of head.weight consists of 8 \+ 8 .* but of 8 \+ 8 \+ 8"):
        trace_layouts(student, ta, (torch.ones(2, 3), None))


def test_a_flattened_axis_repeats_each_channel() -> None:
    def model(width: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, width, 1), nn.Flatten(), nn.Linear(4 * width, 2))

    layout = trace_layouts(model(2), model(5), (torch.ones(1, 1, 2, 2), None))["2.weight"]
    assert layout.axes == {1: (Segment((2, 4), (5, 4)),)}


@pytest.mark.parametrize(
    ("kernel", "settings", "is_seen"),
    [((2, 1), {}, True), ((2, 3), {"padding": (0, 1)}, False), ((1, 1), {"stride": (1, 2)}, False)],
)
def test_channels_beside_a_convolution_stay_in_sight_if_its_kernel_has_length_one_there(
    kernel: tuple[int, int], settings: dict[str, tuple[int, int]], is_seen: bool
) -> None:
    def convolved(x: Tensor) -> Tensor:
        fields = x[:, None, None].expand(-1, -1, 2, -1)
        return F.conv2d(fields, torch.ones(1, 1, *kernel), **settings)[:, 0, 0]  # type: ignore[arg-type]

    found = trace(Through(convolved, 4 if "stride" in settings else 8), (torch.ones(2, 3), None))
    assert (found.axes.get(("head.weight", 1)) == found.axes["entry.weight", 0]) == is_seen


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), max_size=20), st.integers(1, 4))
def test_ties_are_those_of_a_plain_union_find(pairs: list[tuple[int, int]], size: int) -> None:
    channels = Channels()
    channels.new(12)
    reference = {i: {i} for i in range(1, 13)}
    for start in range(0, len(pairs), size):
        first, second = torch.tensor(pairs[start : start + size]).unbind(1)
        channels.tie(first, second)
        for one, other in pairs[start : start + size]:
            joined = reference[one] | reference[other]
            reference.update(dict.fromkeys(joined, joined))
    classes = channels.classes(torch.arange(1, 13)).tolist()
    assert all((classes[i - 1] == classes[j - 1]) == (j in reference[i]) for i in reference for j in reference)


class LastPlace(nn.Module):
    """Attention with a mask in a buffer, of which the last place alone is read: its axis is one channel of the mask."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.qkv, self.head = nn.Embedding(5, 3 * width), nn.Linear(width, 2)
        self.register_buffer("mask", torch.ones(9, 9).tril())

    def forward(self, ids: Tensor) -> Tensor:
        q, k, v = self.qkv(ids).chunk(3, -1)
        length = ids.shape[1]
        scores = (q @ k.mT).masked_fill(self.mask[:length, :length] == 0, -torch.inf)
        last = (scores.softmax(-1) @ v)[:, [-1], :]
        return self.head(last.reshape(-1, last.shape[-1]))


def test_a_place_that_a_view_merges_is_no_factor() -> None:
    ids = torch.arange(4).expand(2, 4)
    found = trace(LastPlace(), (ids, None))
    [part] = parts_of(found, "head.weight", 1)
    assert part.size == 6
    assert found.dimensions[part.dimension].factors == ()
    assert trace_layouts(LastPlace(), LastPlace(9), (ids, None))["head.weight"].axes == {1: 1}


def test_a_factor_that_repeats_itself_is_a_factor_of_the_other() -> None:
    channels = Channels()
    width, short = channels.new(6), channels.new(2)
    slow, _ = channels.split(width, (2, 3))
    one = channels.merge((width, channels.new(2)))
    other = channels.merge((short.repeat_interleave(3), channels.new(2)))
    channels.tie(one, other)
    channels.close_products()  # comes to an end
    assert torch.equal(channels.classes(slow), channels.classes(short))
