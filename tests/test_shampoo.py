"""Shampoo against a plain reference, and what a training run may throw at it."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import matta
from matta.errors import OptimizerError
from matta.optim.grids import Grid
from matta.optim.parameter_groups import shampoo_groups
from matta.optim.preconditioner import Factors, Refresher, inverse_roots, refresh_wave
from matta.optim.shampoo import Shampoo
from shampoo_reference import ReferenceShampoo

GRAFTS = ("adam", "adagrad", "sgd")


def settings(**changes: Any) -> dict[str, Any]:
    plain = {"lr": 0.05, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "graft": "adam"}
    roots = {"statistics_every": 1, "refresh_every": 1, "root_eps": 1e-6, "young_eps": 1e-3}
    return {**plain, "block_size": 4, **roots, **changes}


def gradients_of(shape: tuple[int, ...], steps: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(shape) + steps)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(steps)]


def follow(optimizer: Shampoo, parameters: list[Tensor], gradients: list[list[Tensor | None]]) -> None:
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient
        optimizer.step()


def tower(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Embedding(9, 6),
        nn.Flatten(),
        nn.Linear(12, 8),
        nn.ReLU(),
        nn.Linear(8, 8),
        nn.ReLU(),
        nn.Linear(8, 1),
    ).to(dtype)


def train(model: nn.Module, optimizer: Shampoo, steps: range) -> None:
    for step in steps:
        ids = torch.randint(9, (16, 2), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.mse_loss(model(ids).float().squeeze(1), ids.float().mean(1)).backward()
        optimizer.step()


def same(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


# against the reference


@pytest.mark.parametrize("graft", GRAFTS)
@pytest.mark.parametrize("shape", [(4, 4), (8, 4), (3, 7), (5, 9), (1, 6), (6, 1), (1, 1), (2, 13)])
@pytest.mark.parametrize("every", [(1, 1), (3, 1), (2, 5), (5, 20)])
def test_equals_the_reference(graft: str, shape: tuple[int, int], every: tuple[int, int]) -> None:
    chosen = settings(graft=graft, statistics_every=every[0], refresh_every=every[1])
    gradients = gradients_of(shape, 12)
    parameter = nn.Parameter(torch.ones(shape, dtype=torch.float64))
    reference = ReferenceShampoo(parameter.detach(), **chosen)
    optimizer = Shampoo([parameter], **chosen)
    for gradient in gradients:
        reference.step(gradient)
        follow(optimizer, [parameter], [[gradient]])
    torch.testing.assert_close(parameter.detach(), reference.matrix, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"betas": (0.0, 0.5)},
        {"betas": (0.95, 0.999)},
        {"weight_decay": 0.0},
        {"eps": 1e-3},
        {"root_eps": 1e-2},
        {"young_eps": 0.0},
        {"young_eps": 0.1, "statistics_every": 3},
        {"block_size": 128},
        {"block_size": 1},
    ],
)
def test_every_setting_means_what_it_does_in_the_reference(changes: dict[str, Any]) -> None:
    gradients = gradients_of((7, 6), 9)
    parameter = nn.Parameter(torch.ones(7, 6, dtype=torch.float64))
    reference = ReferenceShampoo(parameter.detach(), **settings(**changes))
    for gradient in gradients:
        reference.step(gradient)
    follow(Shampoo([parameter], **settings(**changes)), [parameter], [[each] for each in gradients])
    torch.testing.assert_close(parameter.detach(), reference.matrix, atol=1e-6, rtol=1e-6)


def test_float32_stays_close_to_the_reference() -> None:
    gradients = gradients_of((6, 5), 10, torch.float32)
    parameter = nn.Parameter(torch.ones(6, 5))
    reference = ReferenceShampoo(parameter.detach(), **settings(root_eps=1e-3))
    for gradient in gradients:
        reference.step(gradient)
    follow(Shampoo([parameter], **settings(root_eps=1e-3)), [parameter], [[each] for each in gradients])
    torch.testing.assert_close(parameter.detach().double(), reference.matrix, atol=1e-4, rtol=1e-4)


def test_stacked_matrices_move_as_each_would_alone() -> None:
    shapes = [(8, 4), (4, 4), (4, 12)]
    gradients = [list(step) for step in zip(*(gradients_of(shape, 8) for shape in shapes), strict=True)]
    together = [nn.Parameter(torch.ones(shape, dtype=torch.float64)) for shape in shapes]
    follow(Shampoo(together, **settings()), together, gradients)
    for index, shape in enumerate(shapes):
        alone = nn.Parameter(torch.ones(shape, dtype=torch.float64))
        follow(Shampoo([alone], **settings()), [alone], [[step[index]] for step in gradients])
        torch.testing.assert_close(alone, together[index], atol=1e-12, rtol=1e-12)


def test_a_convolution_is_a_matrix_of_its_outputs() -> None:
    gradients = gradients_of((4, 3, 2, 2), 6)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        start = torch.ones(4, 3, 2, 2, dtype=torch.float64)
        kernel = nn.Parameter(start.to(memory_format=memory_format))
        matrix = nn.Parameter(start.flatten(1).clone())
        follow(Shampoo([kernel], **settings()), [kernel], [[each] for each in gradients])
        follow(Shampoo([matrix], **settings()), [matrix], [[each.flatten(1)] for each in gradients])
        assert torch.equal(kernel.flatten(1), matrix)


# routing


@pytest.mark.parametrize(
    ("graft", "torch_optimizer"),
    [
        ("adam", lambda p: torch.optim.AdamW(p, lr=0.05, betas=(0.9, 0.95), weight_decay=0.1)),
        ("adagrad", lambda p: torch.optim.Adagrad(p, lr=0.05, eps=1e-8)),
    ],
)
def test_what_is_not_preconditioned_gets_the_first_order_step(graft: str, torch_optimizer: Any) -> None:
    ours, theirs = ([nn.Parameter(torch.ones(shape)) for shape in ((5,), (), (9, 4), (3, 20))] for _ in range(2))
    groups = [{"params": [ours[0], ours[1], ours[3]]}, {"params": [ours[2]], "precondition": False}]
    decay = 0.1 if graft == "adam" else 0.0
    optimizer, other = (
        Shampoo(groups, **settings(graft=graft, weight_decay=decay), max_dim=10),
        torch_optimizer(theirs),
    )
    for step in range(6):
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            for parameter in pair:
                parameter.grad = gradients_of(tuple(parameter.shape), step + 1, torch.float32)[index and -1]
        optimizer.step()
        other.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_a_modules_embeddings_and_what_is_tied_to_them_are_not_preconditioned() -> None:
    model = nn.ModuleDict({"bag": nn.EmbeddingBag(5, 4), "wte": nn.Embedding(7, 4), "head": nn.Linear(4, 7)})
    model["head"].weight = model["wte"].weight
    matrices, tables = shampoo_groups(model)
    assert [id(p) for p in matrices["params"]] == [id(model["head"].bias)]
    assert {id(p) for p in tables["params"]} == {id(model["bag"].weight), id(model["wte"].weight)}
    train(tower(), Shampoo(model), range(0))
    optimizer = Shampoo([{"params": tower(), "lr": 0.5}, {"params": [nn.Parameter(torch.ones(2))]}])
    assert [(g["lr"], g["precondition"]) for g in optimizer.param_groups] == [
        (0.5, True),
        (0.5, False),
        (1e-3, True),
    ]


def test_a_nested_models_tables_are_the_tas() -> None:
    nested = matta.nest(
        nn.Sequential(nn.Embedding(9, 2), nn.Linear(2, 3)), nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3))
    )
    matrices, tables = shampoo_groups(nested)
    assert [id(p) for p in matrices["params"]] == [id(nested.ta[1].weight), id(nested.ta[1].bias)]
    assert [id(p) for p in tables["params"]] == [id(nested.ta[0].weight)]
    Shampoo(nested)


def test_a_repeated_parameter_moves_once() -> None:
    once, twice = (nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    gradient = torch.arange(6.0).view(3, 2)
    follow(Shampoo([once]), [once], [[gradient]])
    follow(Shampoo([twice, twice]), [twice], [[gradient]])
    assert torch.equal(once, twice)


def test_named_parameters_are_taken() -> None:
    model = tower()
    train(model, Shampoo(model.named_parameters()), range(2))
    assert not same(model, tower())


# resuming


@pytest.mark.parametrize("graft", GRAFTS)
@pytest.mark.parametrize("interrupted_at", [1, 5, 13, 27])
def test_resumed_equals_uninterrupted_bit_for_bit(graft: Any, interrupted_at: int) -> None:
    whole = tower()
    train(whole, Shampoo(whole, 0.01, graft=graft, block_size=5, refresh_every=12), range(34))
    first = tower()
    optimizer = Shampoo(first, 0.01, graft=graft, block_size=5, refresh_every=12)
    train(first, optimizer, range(interrupted_at))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = tower(seed=1)
    second.load_state_dict(saved["model"])
    resumed = Shampoo(second, 0.7, block_size=2)
    resumed.load_state_dict(saved["optimizer"])
    train(second, resumed, range(interrupted_at, 34))
    assert same(whole, second)


def test_a_deep_copy_goes_on_alike_and_apart() -> None:
    model = tower()
    optimizer = Shampoo(model, 0.01, process_group=None)
    train(model, optimizer, range(6))
    twin_model, twin = copy.deepcopy((model, optimizer))
    assert twin.process_group is None
    train(twin_model, twin, range(6, 12))
    assert not same(model, twin_model)
    train(model, optimizer, range(6, 12))
    assert same(model, twin_model)


def test_another_optimizers_state_is_refused() -> None:
    model = tower()
    with pytest.raises(OptimizerError, match=r"received a state without .*block_size"):
        Shampoo(model.parameters()).load_state_dict(torch.optim.SGD(model.parameters()).state_dict())


def test_a_state_from_before_young_factors_were_damped_continues_without() -> None:
    model = tower()
    optimizer = Shampoo(model, lr=0.05, young_eps=0.0)
    train(model, optimizer, range(3))
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["young_eps"]
    resumed = copy.deepcopy(model)
    other = Shampoo(resumed, lr=0.05)
    other.load_state_dict(state)
    for each, its_optimizer in ((model, optimizer), (resumed, other)):
        train(each, its_optimizer, range(3, 9))
    assert same(model, resumed)


def test_rounding_errors_of_the_start_are_not_amplified() -> None:
    """Starts that differ by a rounding error, 3e-8 of the weights, stay that close; undamped roots tear them apart."""
    apart = {young_eps: _apart_after_5_steps(young_eps) for young_eps in (0.0, 1e-3)}
    assert apart[1e-3] < 1e-4 < 1e-3 < apart[0.0]


def _apart_after_5_steps(young_eps: float) -> float:
    """The relative distance between a model and one whose start is rounded otherwise."""
    ends = []
    for rounding in (0.0, 6e-8):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(64, 32), nn.Flatten(), *(nn.Linear(256, 96), nn.Tanh(), nn.Linear(96, 64)))
        with torch.no_grad():
            generator = torch.Generator().manual_seed(1)
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(parameter.double() * (1.0 + rounding * noise))
        optimizer = Shampoo(model, lr=0.01, young_eps=young_eps)
        for step in range(5):
            ids = torch.randint(64, (16, 9), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            F.cross_entropy(model(ids[:, :8]), ids[:, 8]).backward()
            optimizer.step()
        ends.append(torch.cat([each.detach().flatten() for each in model.parameters()]))
    return float((ends[0] - ends[1]).norm() / ends[0].norm())


def test_a_state_can_be_loaded_again_and_again() -> None:
    """The Transformers Trainer loads an optimizer's own state each time that it is called."""
    optimizer = Shampoo(nn.Linear(3, 2))
    for _ in range(3):
        optimizer.load_state_dict(optimizer.state_dict())
    fresh = Shampoo(nn.Linear(3, 2))
    fresh.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(Shampoo(nn.Linear(3, 2)).state_dict())


# gradients as they come


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_step_with_a_non_finite_gradient_changes_nothing(bad: float, where: int) -> None:
    model = tower()
    optimizer = Shampoo(model, 0.01)
    train(model, optimizer, range(3))
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    groups = copy.deepcopy(optimizer.state_dict()["param_groups"])
    list(model.parameters())[where].grad.view(-1)[-1] = bad
    optimizer.step()
    assert optimizer.num_skipped == 1
    after = (model.state_dict(), optimizer.state_dict()["state"])
    torch.testing.assert_close(after, before, atol=0, rtol=0)
    assert optimizer.state_dict()["param_groups"] == groups


def test_the_count_of_skipped_steps_is_saved() -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer = Shampoo([parameter])
    follow(optimizer, [parameter], [[torch.full((2, 2), torch.nan)], [torch.ones(2, 2)]])
    other = Shampoo([parameter])
    other.load_state_dict(optimizer.state_dict())
    assert other.num_skipped == copy.deepcopy(other).num_skipped == 1


@pytest.mark.parametrize("graft", GRAFTS)
def test_dead_rows_and_columns_stay_where_they_are(graft: Any) -> None:
    parameter = nn.Parameter(torch.ones(8, 6))
    gradients = gradients_of((8, 6), 30, torch.float32)
    for gradient in gradients:
        gradient[3:7] = 0
        gradient[:, 2] = 0
    follow(Shampoo([parameter], 0.01, graft=graft), [parameter], [[each] for each in gradients])
    assert parameter.isfinite().all()
    torch.testing.assert_close(parameter[3:7].detach(), torch.ones(4, 6), atol=1e-4, rtol=0)
    torch.testing.assert_close(parameter[:, 2].detach(), torch.ones(8), atol=1e-4, rtol=0)
    assert (parameter[:3, 3:] != 1).all()


@pytest.mark.parametrize("graft", GRAFTS)
def test_zero_gradients_and_tiny_ones_give_finite_steps(graft: Any) -> None:
    parameter = nn.Parameter(torch.ones(4, 6))
    optimizer = Shampoo([parameter], 0.01, graft=graft)
    follow(optimizer, [parameter], [[torch.zeros(4, 6)]] * 3)
    assert torch.equal(parameter.detach(), torch.ones(4, 6))
    follow(optimizer, [parameter], [[each * 1e-25] for each in gradients_of((4, 6), 5, torch.float32)])
    assert parameter.isfinite().all()
    follow(optimizer, [parameter], [[each] for each in gradients_of((4, 6), 5, torch.float32)])
    assert parameter.isfinite().all()
    assert (parameter != 1).all()


def test_steps_do_not_depend_on_the_scale_of_gradients() -> None:
    small, large = (nn.Parameter(torch.ones(4, 6, dtype=torch.float64)) for _ in range(2))
    gradients = gradients_of((4, 6), 10)
    follow(Shampoo([small], eps=0.0), [small], [[each * 1e-6] for each in gradients])
    follow(Shampoo([large], eps=0.0), [large], [[each * 1e6] for each in gradients])
    torch.testing.assert_close(small, large)


def test_a_parameter_without_gradient_sits_out() -> None:
    shapes = [(4, 4), (4, 4), (3,)]
    gradients = [list(step) for step in zip(*(gradients_of(shape, 9) for shape in shapes), strict=True)]
    for step in (3, 4, 7):
        gradients[step][1] = None  # type: ignore[call-overload]
        gradients[step][2] = None  # type: ignore[call-overload]
    together = [nn.Parameter(torch.ones(shape, dtype=torch.float64)) for shape in shapes]
    optimizer = Shampoo(together, **settings())
    for step in gradients:
        before = [parameter.detach().clone() for parameter in together]
        follow(optimizer, together, [step])
        moved = [not torch.equal(*pair) for pair in zip(before, together, strict=True)]
        assert moved == [gradient is not None for gradient in step]
    alone = nn.Parameter(torch.ones(4, 4, dtype=torch.float64))
    follow(Shampoo([alone], **settings()), [alone], [[step[0]] for step in gradients])
    torch.testing.assert_close(alone, together[0], atol=1e-12, rtol=1e-12)
    assert [int(optimizer.state[parameter]["step"]) for parameter in together] == [9, 6, 6]


@pytest.mark.parametrize("graft", GRAFTS)
def test_a_parameter_that_thaws_moves_as_if_it_were_new(graft: Any) -> None:
    """Its factors have seen few gradients, and are damped as young ones."""
    chosen = settings(graft=graft, statistics_every=1, refresh_every=1, young_eps=0.1)
    trained, frozen, alone = (nn.Parameter(torch.ones(3, 4, dtype=torch.float64)) for _ in range(3))
    optimizer, fresh = Shampoo([trained, frozen], **chosen), Shampoo([alone], **chosen)
    for step, gradient in enumerate(gradients_of((3, 4), 40)):
        trained.grad, frozen.grad = gradient, gradient if step >= 30 else None
        optimizer.step()
        if step >= 30:
            follow(fresh, [alone], [[gradient]])
            torch.testing.assert_close(frozen, alone, atol=1e-12, rtol=1e-12)
        if step == 35:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = Shampoo([trained, frozen], **chosen)
            optimizer.load_state_dict(state)


def test_matrices_without_elements_are_left_alone() -> None:
    parameters = [nn.Parameter(torch.ones(shape)) for shape in ((0, 4), (4, 0), (0,), (2, 2))]
    follow(Shampoo(parameters), parameters, [[torch.ones_like(p) for p in parameters]])
    assert (parameters[-1] < 1).all()


def test_expanded_gradients_are_read_by_value() -> None:
    table, matrix = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, 4))
    other = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, 4))]
    expanded = [torch.ones(1).expand(3), torch.arange(3.0)[:, None].expand(3, 4)]
    follow(Shampoo([table, matrix]), [table, matrix], [expanded])
    follow(Shampoo(other), other, [[each.contiguous() for each in expanded]])
    assert torch.equal(table, other[0])
    assert torch.equal(matrix, other[1])


@pytest.mark.parametrize("graft", ["adam", "adagrad", "sgd"])
def test_a_sparse_gradient_moves_its_rows_alone(graft: Any) -> None:
    """As the dense one does, if all rows were looked up; a row that was not keeps its weights and its state."""
    torch.manual_seed(0)
    tables = [nn.Embedding(5, 3, sparse=sparse) for sparse in (True, False)]
    tables[1].load_state_dict(tables[0].state_dict())
    optimizers = [Shampoo(each, lr=0.1, graft=graft, weight_decay=0.1) for each in tables]
    rows = torch.tensor([3, 0, 1, 3, 4])
    for _ in range(3):
        for table, optimizer in zip(tables, optimizers, strict=True):
            optimizer.zero_grad()
            table(rows).square().sum().backward()
            optimizer.step()
    sparse, dense = (table.weight.detach() for table in tables)
    torch.testing.assert_close(sparse[[0, 1, 3, 4]], dense[[0, 1, 3, 4]])
    torch.manual_seed(0)
    assert torch.equal(sparse[2], nn.Embedding(5, 3).weight.detach()[2])


def test_a_sparse_gradient_of_what_is_preconditioned_is_refused() -> None:
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(OptimizerError, match=r"sparse gradient of a matrix.*'precondition': False"):
        Shampoo(table.parameters()).step()


def test_a_table_of_a_million_rows_is_not_preconditioned() -> None:
    """`max_dim` keeps it out even where the optimizer cannot tell that it is an embedding."""
    table = nn.Parameter(torch.zeros(1_000_000, 2))
    optimizer = Shampoo([table], lr=0.1)
    table.grad = torch.ones_like(table)
    optimizer.step()
    assert {name: tuple(value.shape) for name, value in optimizer.state[table].items()} == {
        "step": (),
        "exp_avg": (1_000_000, 2),
        "exp_avg_sq": (1_000_000, 2),
    }
    torch.testing.assert_close(table.detach(), torch.full_like(table, -0.1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_have_float32_state(dtype: torch.dtype) -> None:
    model = tower(dtype=dtype)
    optimizer = Shampoo(model, 0.01)
    train(model, optimizer, range(4))
    assert {p.dtype for p in model.parameters()} == {dtype}
    states = optimizer.state_dict()["state"].values()
    assert {tensor.dtype for state in states for tensor in state.values()} == {torch.float32}
    other = Shampoo(model, 0.01)
    other.load_state_dict(optimizer.state_dict())
    torch.testing.assert_close(other.state_dict()["state"], optimizer.state_dict()["state"], atol=0, rtol=0)


# the rest of torch


def test_groups_and_schedulers_set_the_rate() -> None:
    slow, fast = (nn.Parameter(torch.ones(3, 4)) for _ in range(2))
    optimizer = Shampoo([{"params": [slow]}, {"params": [fast], "lr": 0.2}], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step >= 1 else 1.0)
    gradient = torch.arange(12.0).view(3, 4)
    follow(optimizer, [slow, fast], [[gradient, gradient]])
    torch.testing.assert_close((slow - 1) * 2, fast - 1)
    scheduler.step()
    before = slow.detach().clone()
    follow(optimizer, [slow, fast], [[gradient, gradient]])
    assert torch.equal(slow, before)


def test_a_group_added_later_is_trained_too() -> None:
    model = tower()
    optimizer = Shampoo(model[4:], 0.01)
    train(model, optimizer, range(2))
    assert torch.equal(model[2].weight, tower()[2].weight)
    optimizer.add_param_group({"params": model[2].weight})
    train(model, optimizer, range(2, 4))
    assert not torch.equal(model[2].weight, tower()[2].weight)


def test_a_closure_gives_the_loss() -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer = Shampoo([parameter])

    def closure() -> float:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 4.0
    assert (parameter < 1).all()


@pytest.mark.parametrize(("graft", "lr"), [("adam", 0.003), ("adagrad", 0.05), ("adagrad", 0.2), ("sgd", 0.1)])
def test_it_learns_and_adagrad_bears_the_rates_of_a_stream(graft: Any, lr: float) -> None:
    model = tower()
    optimizer = Shampoo(model, lr, graft=graft)
    losses = []
    for step in range(150):
        ids = torch.randint(9, (256, 2), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = F.mse_loss(model(ids).squeeze(1), (ids.float().prod(1) / 20).sin())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": -1.0},
        {"betas": (0.9, 1.0)},
        {"betas": (0.9,)},
        {"betas": 0.9},
        {"lr": "high"},
        {"lr": float("inf")},
        {"eps": -1e-8},
        {"weight_decay": -0.1},
        {"graft": "lion"},
        {"block_size": 0},
        {"block_size": 2.5},
        {"max_dim": -1},
        {"statistics_every": 0},
        {"refresh_every": 0},
        {"root_eps": 0.0},
        {"young_eps": -1e-3},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    name = next(iter(wrong))
    with pytest.raises(OptimizerError, match=rf"^{name}=.* is out of range; expected "):
        Shampoo([nn.Parameter(torch.ones(2, 2))], **wrong)


def test_a_live_student_is_refused() -> None:
    with pytest.raises(OptimizerError, match="received a live Student, .*; expected the whole nesting"):
        Shampoo(matta.nest(nn.Linear(3, 1), nn.Linear(5, 1), layouts={"weight": 1}).student)


def test_complex_parameters_are_refused() -> None:
    with pytest.raises(OptimizerError, match="expected real floating point"):
        Shampoo([nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))])


def test_indices_kept_as_a_parameter_stay_as_they_are() -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 2))
            self.index = nn.Parameter(torch.triu_indices(3, 3, 1), requires_grad=False)
            self.mask = nn.Parameter(torch.ones(3, 3).triu().bool(), requires_grad=False)

    module = Pairs()
    optimizer = Shampoo(module, lr=0.1, weight_decay=0.1)
    first, second = module.weight[module.index]
    (first * second).sum().backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert torch.equal(module.index, torch.triu_indices(3, 3, 1)) and bool((module.weight < 1).all())
    assert torch.equal(module.mask, torch.ones(3, 3).triu().bool())


# roots and their schedule


def test_a_failing_float32_decomposition_is_done_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    decompose = torch.linalg.eigh

    def fail_in_float32(matrices: Tensor) -> Any:
        if matrices.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return decompose(matrices)

    matrices, old = torch.diag_embed(torch.tensor([[1.0, 4.0], [2.0, 3.0]])), torch.eye(2).repeat(2, 1, 1)
    expected = inverse_roots(matrices, old, exponent=-0.25, eps=1e-6)
    monkeypatch.setattr(torch.linalg, "eigh", fail_in_float32)
    torch.testing.assert_close(inverse_roots(matrices, old, exponent=-0.25, eps=1e-6), expected)
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrices: fail_in_float32(matrices.float()))
    factors = Factors.zeros(2, 2, matrices, exponent=-0.25)
    factors.statistics.copy_(matrices)
    factors.refresh([0, 1], eps=1e-6)
    assert torch.equal(factors.roots, old)


def test_a_root_inverts_its_factor_whatever_the_others_of_its_stack_are() -> None:
    matrix = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stack = torch.stack([matrix @ matrix.T, torch.zeros(6, 6), torch.full((6, 6), torch.inf)])
    old = 3 * torch.eye(6).double().repeat(3, 1, 1)
    roots = inverse_roots(stack, old, exponent=-0.25, eps=1e-12)
    scaled = stack[0] / torch.linalg.eigvalsh(stack[0])[-1]
    inverse = torch.linalg.matrix_power(roots[0], 4)
    torch.testing.assert_close(inverse @ scaled, torch.eye(6).double(), atol=1e-6, rtol=0)
    assert torch.equal(roots[1:], old[1:])


@pytest.mark.parametrize("every", [1, 2, 3, 7, 10, 20, 50])
def test_every_wave_refreshes_every_root_once_and_evenly(every: int) -> None:
    sizes, like = ((5, 8), (5, 4), (3, 16)), torch.zeros(())
    factors = [Factors.zeros(num, side, like, exponent=-0.25) for num, side in sizes]
    refresher = Refresher(factors)
    seen: dict[int, list[tuple[int, int]]] = {}
    for step in range(1, 4 * every + 1):
        start, length = refresh_wave(step, every)
        assert start <= step < start + length
        due = [(id(each), block) for each, block in refresher.due(step, every)]
        work = sum(len(each.roots[0]) ** 3 for each, _ in refresher.due(step, every))
        assert work <= refresher.work / length + 16**3
        seen.setdefault(start, []).extend(due)
    last = seen.pop(4 * every)
    assert len(last) <= 13
    everything = [(id(each), block) for each, block in refresher.units]
    assert all(due == everything for due in seen.values())
    assert sorted(seen) == [s for s in (1, 4, 8, 16, 24, 32, 40) if s < every] + [
        every,
        2 * every,
        3 * every,
    ]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (4, 4), (5, 4), (9, 13), (8, 1)])
@pytest.mark.parametrize("block_size", [1, 3, 4, 100])
def test_a_grid_joins_what_it_cuts(rows: int, columns: int, block_size: int) -> None:
    grid = Grid.of(rows, columns, block_size=block_size)
    matrix = torch.randn(rows, columns)
    blocks = grid.cut(matrix)
    assert max(blocks.shape[2:]) <= block_size
    assert blocks.shape[0] * blocks.shape[1] == grid.num_blocks
    assert torch.equal(grid.join(blocks), matrix)


@pytest.mark.parametrize(("before", "after"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
@pytest.mark.parametrize("graft", GRAFTS)
def test_a_state_of_another_precision_is_taken_over(graft: Any, before: torch.dtype, after: torch.dtype) -> None:
    first, second = (nn.Linear(3, 2, dtype=dtype) for dtype in (before, after))
    second.load_state_dict(first.state_dict())
    saved, resumed = (Shampoo(each, **settings(graft=graft)) for each in (first, second))
    steps = gradients_of((2, 4), 8)
    for step in steps[:4]:
        follow(saved, list(first.parameters()), [[step[:, :3].to(before), step[:, 3].to(before)]])
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(saved.state_dict())
    for step in steps[4:]:
        for optimizer, module, dtype in ((saved, first, before), (resumed, second, after)):
            follow(optimizer, list(module.parameters()), [[step[:, :3].to(dtype), step[:, 3].to(dtype)]])
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-3, atol=1e-4)
    kept = [value for each in resumed.state_dict()["state"].values() for name, value in each.items() if name != "step"]
    assert {value.dtype for value in kept} == {after}


def test_a_state_of_other_shapes_is_refused_before_anything_changes() -> None:
    saved = Shampoo(nn.Linear(3, 2), **settings(lr=0.5))
    follow(saved, saved.param_groups[0]["params"], [[torch.ones(2, 3), torch.ones(2)]])
    for other in (nn.Linear(3, 8), nn.Linear(2, 2)):  # of more blocks the first state would be broadcast
        optimizer = Shampoo(other, **settings())
        with pytest.raises(OptimizerError, match="exp_avg of shape .* in the same order"):
            optimizer.load_state_dict(saved.state_dict())
        assert optimizer.param_groups[0]["lr"] == settings()["lr"]
        assert not optimizer.state


@pytest.mark.parametrize("wrong", [{}, {"model": {}, "optimizer": {}}, None, []])
def test_what_is_no_state_is_refused(wrong: Any) -> None:
    with pytest.raises(OptimizerError, match="as the state; expected what Shampoo.state_dict"):
        Shampoo(nn.Linear(3, 2)).load_state_dict(wrong)


def test_a_module_is_added_as_a_group() -> None:
    table, head = nn.Embedding(5, 4), nn.Linear(4, 2)
    optimizer = Shampoo(head)
    optimizer.add_param_group({"params": nn.Sequential(table, nn.Linear(4, 4)), "lr": 0.5})
    assert [(len(each["params"]), each["precondition"], each["lr"]) for each in optimizer.param_groups[1:]] == [
        (2, True, 0.5),
        (1, False, 0.5),
    ]
    with pytest.raises(OptimizerError, match="lr=-1"):
        optimizer.add_param_group({"params": nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4)), "lr": -1})
    assert len(optimizer.param_groups) == 3


@pytest.mark.parametrize("name", ["maximize", "amsgrad", "momentum", "nesterov"])
def test_settings_of_other_optimizers_in_a_group_are_refused(name: str) -> None:
    with pytest.raises(OptimizerError, match=f"received {name}=True in a group"):
        Shampoo([{"params": nn.Linear(3, 2).parameters(), name: True}])
    Shampoo([{"params": nn.Linear(3, 2).parameters(), name: False}])
