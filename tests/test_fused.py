"""Heads and losses in one, over chunks: the same losses and gradients as with whole logits, or none of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import matta
from matta.errors import LabelError, MattaError
from matta.objectives import CausalLM, Classification, TopK, top_k
from matta.objectives.fused_losses import RowLabels, fused_losses
from matta.objectives.heads import DeferredLogits, LinearLogits, candidates, deferred, deferring, undeferred
from matta.objectives.losses import LossWeights

VOCABULARY, BATCH, LENGTH, IGNORED = 13, 3, 5, -100
WEIGHTS = matta.Weights(student=0.7, ta=1.3, distill=0.5)


class Model(nn.Module):
    """Embedding, one block and a head; `after` is what it does with the logits."""

    def __init__(self, width: int, *, bias: bool = False, tied: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.body = nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, width), nn.Dropout(dropout))
        self.head = nn.Linear(width, VOCABULARY, bias=bias)
        if tied:
            self.head.weight = self.tokens.weight

    def after(self, logits: Tensor) -> Any:
        return logits

    def forward(self, ids: Tensor) -> Any:
        return self.after(self.head(self.body(self.tokens(ids))))


class InAnObject(Model):
    def after(self, logits: Tensor) -> Any:
        return SimpleNamespace(logits=logits)


class Scaled(Model):
    def after(self, logits: Tensor) -> Tensor:
        return logits * 0.5


class Capped(Model):
    """Changes the logits in place and returns the tensor that the head returned."""

    def after(self, logits: Tensor) -> Tensor:
        logits.mul_(2).add_(torch.linspace(0, 1, VOCABULARY, dtype=logits.dtype))
        return logits


class Masked(Model):
    def after(self, logits: Tensor) -> Tensor:
        logits[..., 3] = -4.0
        return logits


class OwnFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


class ThroughOwnFunction(Model):
    def after(self, logits: Tensor) -> Tensor:
        return OwnFunction.apply(logits)


class Hooked(Model):
    """Halves the gradient of its logits."""

    def after(self, logits: Tensor) -> Tensor:
        logits.register_hook(lambda gradient: gradient / 2)
        return logits


class HeadFirst(nn.Module):
    """Registers its head before its body."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, VOCABULARY)
        self.body = nn.Sequential(nn.Embedding(VOCABULARY, width), nn.Linear(width, width))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(ids))


def make(kind: Callable[..., nn.Module] = Model, *widths: int, **options: Any) -> matta.Nested:
    torch.manual_seed(0)
    *students, ta = [kind(width, **options).double() for width in widths or (4, 6)]
    return matta.nest(students, ta, layouts={"*": 1})


def batch(labels: str = "hard", seed: int = 0) -> tuple[Tensor, Any]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
    if "top" in labels:
        return ids, top_labels(labels, generator)
    if "soft" in labels:
        target = torch.rand(BATCH, LENGTH, VOCABULARY, generator=generator, dtype=torch.float64).softmax(-1)
    else:
        target = ids.clone()
    if "masked" in labels:
        target[0, 2:] = IGNORED
    return ids, torch.full_like(target, IGNORED) if "none" in labels else target


def top_labels(kind: str, generator: torch.Generator) -> TopK:
    """The likeliest 4 classes at each position, 1, or all; one position is sure, and one knows nothing of its 4."""
    logits = 3 * torch.randn(BATCH, LENGTH, VOCABULARY, generator=generator, dtype=torch.float64)
    logits[1, 1, 2] = 1000.0
    observed = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
    labels = top_k(logits, {"top one": 1, "top all": VOCABULARY}.get(kind, 4), observed)
    labels.log_probs[2, 2] -= 50.0 if kind != "top all" else 0.0
    if "masked" in kind:
        observed[0, 2:] = IGNORED
    if "none" in kind:
        observed.fill_(IGNORED)
    return labels


def outcome(nested: matta.Nested, objective: Any, data: Any, **arguments: Any) -> dict[str, Tensor]:
    """Losses and gradients of a step."""
    nested.zero_grad()
    cotrain = matta.CoTraining(nested, objective, **{"weights": WEIGHTS, **arguments}).train()
    out = cotrain(data)
    out.loss.backward()
    gradients = {name: p.grad.clone() for name, p in nested.named_parameters() if p.grad is not None}
    losses = [out.loss.detach(), out.ta_loss, *out.student_losses, *out.distill_losses]
    return gradients | {f"loss {index}": loss for index, loss in enumerate(losses)}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    assert found
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m)


@pytest.fixture
def no_logits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whole logits may not be computed."""

    def refuse(self: LinearLogits) -> Tensor:
        raise AssertionError("whole logits were computed")

    with monkeypatch.context() as patch:
        patch.setattr(LinearLogits, "compute", refuse)
        yield


# ------------------------------------------------------------------------ equal to the plain form


KINDS = ["hard", "soft", "top", "hard masked", "soft masked", "top masked", "hard none", "soft none", "top none"]


@pytest.mark.parametrize("labels", [*KINDS, "top one", "top all"])
@pytest.mark.parametrize("objective", [CausalLM, Classification])
def test_losses_and_gradients_equal_the_plain_ones(labels: str, objective: Any, no_logits: None) -> None:
    expected = outcome(make(), objective(fused=False), batch(labels))
    assert_same(outcome(make(), objective(fused=True, chunk=4), batch(labels)), expected)


@pytest.mark.parametrize("kind", [Model, InAnObject, HeadFirst])
@pytest.mark.parametrize("widths", [(6, 6), (4, 6), (3, 4, 6), (6, 4, 6)])
@pytest.mark.parametrize("chunk", [1, 5, None])
def test_any_head_and_any_number_of_students(kind: Any, widths: tuple[int, ...], chunk: int | None) -> None:
    expected = outcome(make(kind, *widths), CausalLM(fused=False), batch())
    assert_same(outcome(make(kind, *widths), CausalLM(fused=True, chunk=chunk), batch()), expected)


@pytest.mark.parametrize("labels", ["hard masked", "top masked"])
@pytest.mark.parametrize("options", [{"bias": True}, {"tied": True}, {"bias": True, "tied": True}], ids=str)
def test_heads_with_a_bias_and_tied_ones(options: dict[str, bool], labels: str) -> None:
    expected = outcome(make(**options), CausalLM(fused=False), batch(labels))
    assert_same(outcome(make(**options), CausalLM(fused=True, chunk=4), batch(labels)), expected)


@pytest.mark.parametrize("labels", ["hard", "top"])
@pytest.mark.parametrize("zero", ["student", "ta", "distill", "student distill", "student ta distill"])
def test_losses_may_weigh_nothing(zero: str, labels: str) -> None:
    weights = matta.Weights(**dict.fromkeys(zero.split(), 0.0))
    expected = outcome(make(), CausalLM(fused=False), batch(labels), weights=weights)
    assert_same(outcome(make(), CausalLM(fused=True), batch(labels), weights=weights), expected)


@pytest.mark.parametrize("widths", [(4, 6), (3, 4, 6)])
@pytest.mark.parametrize("chunk", [1, 5, None])
def test_the_top_k_with_several_students(widths: tuple[int, ...], chunk: int | None, no_logits: None) -> None:
    expected = outcome(make(Model, *widths), CausalLM(fused=False), batch("top masked"))
    assert_same(outcome(make(Model, *widths), CausalLM(fused=True, chunk=chunk), batch("top masked")), expected)


def test_the_top_k_of_all_classes_are_their_probabilities() -> None:
    ids, labels = batch("top all")
    probs = torch.zeros(BATCH, LENGTH, VOCABULARY, dtype=torch.float64).scatter(
        2, labels.indices, labels.log_probs.exp()
    )
    for fused in (False, True):
        expected = outcome(make(), CausalLM(fused=False), (ids, probs))
        assert_same(outcome(make(), CausalLM(fused=fused), (ids, labels)), expected)


def test_a_ramp_a_teacher_and_a_sampled_model() -> None:
    def run(fused: bool) -> dict[str, Tensor]:
        nested = make()
        torch.manual_seed(1)
        teacher = Model(5).double()
        options = {"ramp": matta.Ramp(start=-0, steps=4), "teacher": teacher}
        cotrain = matta.CoTraining(nested, CausalLM(fused=fused), sample=matta.random_sub_model(nested), **options)
        for _ in range(3):
            cotrain(batch("hard masked")).loss.backward()
        return {name: p.grad for name, p in nested.named_parameters() if p.grad is not None}

    assert_same(run(True), run(False))


def test_frozen_heads_and_frozen_bodies() -> None:
    for frozen in ("head", "body", "tokens"):
        found = []
        for fused in (False, True):
            nested = make(bias=True)
            nested.ta.get_submodule(frozen).requires_grad_(False)
            found.append(outcome(nested, CausalLM(fused=fused), batch()))
        assert_same(found[1], found[0])


def test_gradients_are_scaled_and_accumulated_as_the_callers_ask() -> None:
    def run(fused: bool) -> dict[str, Tensor]:
        cotrain = matta.CoTraining(make(tied=True), CausalLM(fused=fused), weights=WEIGHTS)
        (cotrain(batch(seed=0)).loss * 1024 / 2).backward()
        (cotrain(batch("hard masked", seed=1)).loss / 2 + sum(p.sum() for p in cotrain.parameters())).backward()
        (cotrain(batch("top masked", seed=2)).loss / 2).backward()
        return {name: p.grad for name, p in cotrain.named_parameters()}

    assert_same(run(True), run(False))


def test_labels_at_some_indices_are_labels_of_all_classes_with_zeros() -> None:
    """Also where they do not sum to 1: the k most likely of a Teacher."""
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(7, VOCABULARY, generator=generator, dtype=torch.float64).softmax(-1)
    top, indices = probs.topk(3)
    weights = LossWeights(student=0.7, ta=1.3, distill=torch.tensor(0.5, dtype=torch.float64))
    found = []
    for labels in (
        RowLabels(probs=top, indices=indices),
        RowLabels(probs=torch.zeros_like(probs).scatter(1, indices, top)),
    ):
        torch.manual_seed(0)
        heads = [
            LinearLogits(
                *(
                    torch.randn(*s, dtype=torch.float64).requires_grad_()
                    for s in ((7, 4), (VOCABULARY, 4), (VOCABULARY,))
                ),
                torch.float64,
            )
            for _ in range(2)
        ]
        made = fused_losses(heads[0], heads[1:], labels, torch.ones(7, dtype=torch.bool), weights, chunk=3)
        gradients = torch.autograd.grad(made.loss, [t for head in heads for t in (head.hidden, *head.parameters)])
        found.append({str(i): each for i, each in enumerate((made.ta, *made.students, *made.distill, *gradients))})
    assert_same(found[0], found[1])
    # And both are what autograd makes of Eq. 1-3.
    ta, student = (head.compute().log_softmax(-1) for head in heads)
    loss = 1.3 * -(labels.probs * ta).sum(-1) + 0.7 * -(labels.probs * student).sum(-1)
    loss = (loss + 0.5 * -(ta.detach().exp() * student).sum(-1)).mean()
    expected = torch.autograd.grad(loss, [t for head in heads for t in (head.hidden, *head.parameters)])
    assert_same(
        {str(i + 3): each for i, each in enumerate(expected)}, {k: v for k, v in found[0].items() if int(k) > 2}
    )


@pytest.mark.parametrize("labels", ["hard", "top", "top all"])
def test_large_logits_stay_finite(labels: str) -> None:
    """Also where the model leaves nothing for what is not among the top k."""
    nested = make()
    with torch.no_grad():
        nested.ta.head.weight.mul_(1e5)
    found = outcome(nested, CausalLM(fused=True), batch(labels))
    assert all(torch.isfinite(tensor).all() for tensor in found.values())
    assert_same(found, outcome(nested, CausalLM(fused=False), batch(labels)))


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_a_class_masked_out_by_the_bias(labels: str) -> None:
    found = []
    for fused in (False, True):
        nested = make(bias=True)
        ids, target = batch(labels)
        target = target.clamp(max=VOCABULARY - 2) if labels == "hard" else target
        with torch.no_grad():
            nested.ta.head.bias[-1] = -torch.inf
            if labels == "soft":
                target[..., 0] += target[..., -1]
                target[..., -1] = 0
        found.append(outcome(nested, CausalLM(fused=fused), (ids, target)))
    assert all(torch.isfinite(each).all() for each in found[1].values())
    assert_same(found[1], found[0])


def test_without_gradient_nothing_is_kept(no_logits: None) -> None:
    nested = make()
    cotrain = matta.CoTraining(nested, CausalLM(fused=True, chunk=4), weights=WEIGHTS).eval()
    expected = matta.CoTraining(nested, CausalLM(fused=False), weights=WEIGHTS).eval()(batch())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = cotrain(batch())
        assert not out.loss.requires_grad
        torch.testing.assert_close(out.loss, expected.loss.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("labels", ["hard masked", "top masked"])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bf16 weights"])
def test_bf16(autocast: bool, labels: str) -> None:
    found = []
    for fused in (False, True):
        nested = make(tied=True, bias=True).to(torch.float32 if autocast else torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            cotrain = matta.CoTraining(nested, CausalLM(fused=fused, chunk=4), weights=WEIGHTS)
            out = cotrain(batch(labels))
        assert out.loss.dtype == torch.float32
        out.loss.backward()
        found.append({name: p.grad.float() for name, p in nested.named_parameters()})
        assert out.student_logits.dtype == torch.bfloat16
        found[-1]["loss"] = out.loss.detach()
    torch.testing.assert_close(found[1]["loss"], found[0]["loss"], rtol=1e-5, atol=0)
    for name, gradient in found[1].items():
        assert (gradient - found[0][name]).norm() <= 0.02 * found[0][name].norm(), name


def test_sums_over_many_rows_do_not_overflow_in_float16() -> None:
    """Each row of the gradient is small; before the mean is taken their sum is over 65,504."""
    torch.manual_seed(0)
    hidden, labels = torch.full((8192, 4), 30.0), torch.zeros(8192, dtype=torch.long)
    gradients = []
    for fused in (False, True):
        torch.manual_seed(0)
        cotrain = matta.CoTraining(matta.nest(nn.Linear(4, 3), nn.Linear(4, 3)), Classification(fused=fused))
        with torch.no_grad():
            cotrain.nested.ta.bias[0] = -200.0
        with torch.autocast("cpu", torch.float16):
            cotrain((hidden, labels)).loss.backward()
        gradients.append(cotrain.nested.ta.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-2, atol=1e-2)


# ------------------------------------------------------------------------ when it is used


def test_many_logits_are_fused_without_being_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    fused = fused_losses
    monkeypatch.setattr(
        "matta.objectives.classification.fused_losses", lambda *a, **k: used.append(1) or fused(*a, **k)
    )
    outcome(make(), CausalLM(), batch())
    assert not used
    monkeypatch.setattr("matta.objectives.classification._FUSED_FROM", BATCH * LENGTH * VOCABULARY)
    outcome(make(), CausalLM(), batch())
    outcome(make(), Classification(), batch())
    assert len(used) == 2
    outcome(make(), CausalLM(fused=False), batch())
    outcome(make(Scaled), CausalLM(), batch())
    assert len(used) == 2


@pytest.mark.parametrize("labels", ["hard", "soft", "top"])
def test_few_logits_are_not_put_off(labels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = batch(labels)[1]
    assert CausalLM(fused=False).least_deferred(target) is None
    assert CausalLM(fused=True).least_deferred(target) == 1
    monkeypatch.setattr("matta.objectives.classification._FUSED_FROM", BATCH * LENGTH * VOCABULARY)
    assert CausalLM().least_deferred(target) == VOCABULARY
    nested = make()
    for least, kind in ((VOCABULARY, DeferredLogits), (VOCABULARY + 1, Tensor)):
        with deferring([nested.ta, nested.student], least):
            assert {type(model(batch()[0])) for model in (nested.ta, nested.student)} == {kind}


@pytest.mark.parametrize("kind", [Scaled, Capped, Masked, ThroughOwnFunction, Hooked])
@pytest.mark.parametrize("autocast", [False, True])
def test_logits_that_are_worked_on_are_computed_as_ever(
    kind: Any, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(fused: bool | None) -> dict[str, Tensor]:
        nested = make(kind, bias=True).to(torch.float32 if autocast else torch.float64)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return outcome(nested, CausalLM(fused=fused), batch())

    monkeypatch.setattr("matta.objectives.classification._FUSED_FROM", 1)
    assert_same(run(None), run(False), 1e-2 if autocast else 1e-12)
    with pytest.raises(LabelError, match="fused=True.*the TA.*fused=None"):
        run(True)


def test_a_head_with_hooks_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matta.objectives.classification._FUSED_FROM", 1)
    nested = make()
    nested.ta.head.register_forward_hook(lambda module, args, out: out * 2)
    assert candidates(nested.ta) == []
    assert candidates(nested.student) == [nested.student.head]
    expected = outcome(nested, CausalLM(fused=False), batch())
    assert_same(outcome(nested, CausalLM(), batch()), expected)
    with pytest.raises(LabelError, match="fused=True"):
        outcome(nested, CausalLM(fused=True), batch())


def test_the_heads_are_as_they_were_afterwards() -> None:
    nested = make()
    with deferring([nested.ta]):
        assert type(nested.ta(batch()[0])) is DeferredLogits
    with pytest.raises(TypeError), deferring([nested.ta]):
        nested.ta()
    assert "forward" not in nested.ta.head.__dict__
    assert type(nested.ta(batch()[0])) is Tensor


def test_deferred_logits_answer_for_themselves() -> None:
    torch.manual_seed(0)
    model, ids = Model(4, bias=True).double(), batch()[0]
    expected = model(ids)
    with deferring([model]):
        logits = model(ids)
        read = model(ids)
    assert (logits.shape, logits.dtype, logits.requires_grad) == (expected.shape, torch.float64, True)
    assert deferred(logits) is not None
    assert torch.equal(undeferred(logits), expected)
    assert torch.equal(read.argmax(-1), expected.argmax(-1))
    assert deferred(read) is None
    for tensor in (undeferred(read), undeferred(logits)):
        assert type(tensor) is Tensor
        found = torch.autograd.grad(tensor.square().sum(), list(model.parameters()), retain_graph=True)
        wanted = torch.autograd.grad(expected.square().sum(), list(model.parameters()), retain_graph=True)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)


def test_a_chunk_has_rows() -> None:
    with pytest.raises(LabelError, match="chunk=0"):
        CausalLM(chunk=0)


@pytest.mark.parametrize("objective", [CausalLM(fused=True), Classification(fused=True)])
def test_labels_are_checked_as_ever(objective: Any) -> None:
    ids, _ = batch()
    for labels in (ids[:, :2], torch.full_like(ids, VOCABULARY), torch.zeros(BATCH, LENGTH, VOCABULARY)):
        with pytest.raises(LabelError):
            matta.CoTraining(make(), objective)((ids, labels))


# ------------------------------------------------------------------------ backward passes, and logits asked for


def test_a_second_backward_pass_is_refused() -> None:
    loss = matta.CoTraining(make(), CausalLM(fused=True))(batch()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(MattaError, match="second backward.*fused=False"):
        loss.backward()


def test_differentiating_twice_is_refused() -> None:
    nested = make()
    loss = matta.CoTraining(nested, CausalLM(fused=True))(batch()).loss
    with pytest.raises(MattaError, match="create_graph=True.*fused=False"):
        torch.autograd.grad(loss, nested.ta.head.weight, create_graph=True)


def test_logits_are_computed_when_they_are_read_and_not_after_the_weights_moved() -> None:
    nested = make(Model, 3, 4, 6)
    ids, labels = batch()
    out = matta.CoTraining(nested, CausalLM(fused=True))((ids, labels))
    out.loss.backward()
    torch.testing.assert_close(out.ta_logits, nested.ta(ids).detach())
    torch.testing.assert_close(out.student_logits, nested.student(ids).detach())
    assert [each.shape for each in out.all_student_logits] == [(BATCH, LENGTH, VOCABULARY)] * 2
    assert not out.ta_logits.requires_grad
    torch.optim.SGD(nested.parameters(), lr=0.1).step()
    with pytest.raises(MattaError, match="weights of the head have moved"):
        _ = out.student_logits


# ------------------------------------------------------------------------ activation checkpointing, processes


class Checkpointed(Model):
    reentrant: bool | None = None
    with_head = False

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        if self.reentrant is None:
            return self.head(self.body(x))
        if self.with_head:
            return checkpoint(lambda x: self.head(self.body(x)), x, use_reentrant=self.reentrant)
        return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool, with_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matta.objectives.classification._FUSED_FROM", 1)
    expected = outcome(make(Checkpointed), CausalLM(fused=False), batch())
    nested = make(Checkpointed)
    for module in (nested.ta, nested.student):
        module.reentrant, module.with_head = reentrant, with_head
    fused = None if reentrant and with_head else True
    assert_same(outcome(nested, CausalLM(fused=fused), batch()), expected)


def _train_in_parallel(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    ids, labels = batch()
    mesh = init_device_mesh("cpu", (2,))
    head_alone = Model(4)
    fully_shard(head_alone.head, mesh=mesh)
    assert candidates(head_alone) == []
    for wrapper in ("ddp", "fsdp", "ddp top", "fsdp top"):
        cotrain = matta.CoTraining(make(tied=True), CausalLM(fused=True, chunk=4), weights=WEIGHTS)
        run = DistributedDataParallel(cotrain) if "ddp" in wrapper else fully_shard(cotrain, mesh=mesh)
        own = slice(rank, rank + 1)
        out = run((ids[own], batch("top")[1].at(own) if "top" in wrapper else labels[own]))
        assert out.ta_logits.shape == (1, LENGTH, VOCABULARY)
        out.loss.backward()
        if "fsdp" in wrapper:
            with pytest.raises(MattaError, match="were sharded"):
                _ = out.ta_logits
        gradients = {name: p.grad for name, p in cotrain.named_parameters()}
        full = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in gradients.items()}
        torch.save(full, f"{folder}/{wrapper}-{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_train_in_parallel, (str(tmp_path),), nprocs=2)
    ids, labels = batch()
    for end, target in (("", labels[:2]), (" top", batch("top")[1].at(slice(2)))):
        cotrain = matta.CoTraining(make(tied=True), CausalLM(fused=False), weights=WEIGHTS)
        cotrain((ids[:2], target)).loss.backward()
        expected = {name: p.grad for name, p in cotrain.named_parameters()}
        for wrapper in ("ddp", "fsdp"):
            for rank in range(2):
                assert_same(torch.load(tmp_path / f"{wrapper}{end}-{rank}.pt"), expected)


# ------------------------------------------------------------------------ Transformers


def _gpt2(**sizes: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = {"n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 8, "vocab_size": VOCABULARY, **sizes}
    return GPT2LMHeadModel(GPT2Config(**settings, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))


def _decoder(name: str, **sizes: int) -> nn.Module:
    import transformers

    settings = {
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
    }
    config = getattr(transformers, f"{name}Config")(**settings, vocab_size=VOCABULARY, pad_token_id=0, **sizes)
    return getattr(transformers, f"{name}ForCausalLM")(config)


FUSED = {
    "GPT2": lambda ffn: _gpt2(n_inner=ffn),
    "Llama": lambda ffn: _decoder("Llama", intermediate_size=ffn),
    "Qwen3": lambda ffn: _decoder("Qwen3", intermediate_size=ffn, tie_word_embeddings=True),
}


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("training", [True, False])
def test_decoders_of_transformers(name: str, training: bool, no_logits: None) -> None:
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        nested = matta.nest(FUSED[name](8).double(), FUSED[name](16).double())
        ids, labels = batch("hard masked")
        data = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        found.append(outcome(nested.train(training), CausalLM(fused=fused), data))
    assert_same(found[1], found[0])


def test_capped_logits_of_gemma_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matta.objectives.classification._FUSED_FROM", 1)
    found = []
    for fused in (False, None):
        torch.manual_seed(0)
        nested = matta.nest(*(_decoder("Gemma2", intermediate_size=ffn).double() for ffn in (8, 16)))
        ids, labels = batch()
        found.append(outcome(nested, CausalLM(fused=fused), {"input_ids": ids, "labels": labels}))
    assert_same(found[1], found[0])
    with pytest.raises(LabelError, match="fused=True"):
        outcome(nested, CausalLM(fused=True), {"input_ids": ids, "labels": labels})
