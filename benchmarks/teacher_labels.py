"""What becomes of the mass that a Teacher's top k leaves over: forms of the tail against the full labels.

A byte-level Teacher (3 layers, d 96) learns CPython's `pydoc_data.topics` but its last tenth; Students (2 layers,
d 32) are then trained on its labels for that text, cut to the likeliest k of 257 tokens. The tail is

    renormalised   nothing: the k probabilities are divided by their sum
    uniform        the same for each of the other tokens
    other          one bin: the Student must give them that much together, however it likes
    next           put onto the token that comes next in the text
    drawn          1 for the token that comes next if it is not among the k, else nothing (unbiased, sums to 1 on
                   average)
    listed         as `other`, with the token that comes next in the list too
    observed       as `other`, and where the token that comes next is among the others, its cross-entropy given that it
                   is one of them (unbiased, and each row sums to 1): what `matta.objectives.TopK` does

beside the full labels (`full`) and the text alone (`hard`). For each: the distance of the gradient of the Student's
parameters from the one that full labels give, relative to its norm, at the start, and after 50 and 200 steps on full
labels (mean over batches; a step sees one batch, so noise counts); and after 400 steps on the same batches for all,
on the held-out tenth, the Student's bits per byte and its cross-entropy against the Teacher's distribution (bits
over the Teacher's entropy).

    python benchmarks/teacher_labels.py [--quick] [--seeds N] [--json]
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable
from pydoc_data import topics

import torch
from torch import Tensor, nn
from torch.nn import functional

from figures import benchmark_parser, print_figures
from tiny_gpt import TinyGPT, next_token_loss

VOCABULARY, CONTEXT, BATCH_SIZE = 257, 64, 16
TOPS = (4, 8, 32)
Loss = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def main() -> None:
    """Measure and print."""
    parser = benchmark_parser(
        "Forms of the tail of a Teacher's top-k labels.", quick="a smaller Teacher and fewer steps: a minute"
    )
    parser.add_argument("--seeds", type=int, default=1, help="training runs of each form (default: 1)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    train, test = text()
    teacher = make_teacher(train, num_steps=100 if options.quick else 800)
    steps = 20 if options.quick else 400
    figures = {"teacher_bits_per_byte": bits(teacher, test), **distances(teacher, train)}
    for seed in range(options.seeds):
        print(json.dumps(figures), file=sys.stderr, flush=True)
        for name, value in trained(teacher, train, test, steps, seed).items():
            figures.setdefault(name, []).append(value)  # type: ignore[attr-defined]
    figures = {name: statistics.mean(each) if isinstance(each, list) else each for name, each in figures.items()}
    print_figures(figures, as_json=options.json)


def text() -> tuple[Tensor, Tensor]:
    """Bytes to learn from, and to judge by."""
    joined = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    data = torch.tensor(list(joined.encode()))
    cut = len(data) * 9 // 10
    return data[:cut], data[cut:]


def batch(data: Tensor, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(data) - CONTEXT, (BATCH_SIZE, 1), generator=generator)
    return data[starts + torch.arange(CONTEXT)]


def make_teacher(data: Tensor, num_steps: int) -> nn.Module:
    torch.manual_seed(0)
    teacher = TinyGPT(num_layers=3, width=96, hidden=384, vocabulary=VOCABULARY, context=CONTEXT)
    fit(teacher, num_steps, lambda model, ids: next_token_loss(model, ids), data, seed=100)
    return teacher.eval().requires_grad_(False)


def fit(model: nn.Module, num_steps: int, loss: Callable[[nn.Module, Tensor], Tensor], data: Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss(model, batch(data, generator)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()


def student(seed: int) -> TinyGPT:
    torch.manual_seed(seed)
    return TinyGPT(num_layers=2, width=32, hidden=128, vocabulary=VOCABULARY, context=CONTEXT)


# ------------------------------------------------------------------------ labels: rows of logits, of Teacher's, tokens


def full(logits: Tensor, probs: Tensor, tokens: Tensor, k: int) -> Tensor:
    return -(probs * logits.log_softmax(-1)).sum(-1).mean()


def hard(logits: Tensor, probs: Tensor, tokens: Tensor, k: int) -> Tensor:
    return functional.cross_entropy(logits, tokens)


def renormalised(logits: Tensor, probs: Tensor, tokens: Tensor, k: int) -> Tensor:
    top, indices = probs.topk(k)
    return -(top / top.sum(-1, keepdim=True) * logits.log_softmax(-1).gather(1, indices)).sum(-1).mean()


def uniform(logits: Tensor, probs: Tensor, tokens: Tensor, k: int) -> Tensor:
    top, indices = probs.topk(k)
    rest = (1 - top.sum(-1, keepdim=True)).clamp(min=0) / (VOCABULARY - k)
    return full(logits, rest.expand_as(probs).scatter(1, indices, top), tokens, k)


def other(logits: Tensor, probs: Tensor, tokens: Tensor, k: int) -> Tensor:
    listed = torch.zeros_like(probs, dtype=torch.bool).scatter(1, probs.topk(k).indices, True)
    return _lumped(logits, probs, listed)


def listed(logits: Tensor, probs: Tensor, tokens: Tensor, k: int) -> Tensor:
    listed = torch.zeros_like(probs, dtype=torch.bool).scatter(1, probs.topk(k).indices, True)
    return _lumped(logits, probs, listed.scatter(1, tokens.unsqueeze(1), True))


def observed(logits: Tensor, probs: Tensor, tokens: Tensor, k: int) -> Tensor:
    listed = torch.zeros_like(probs, dtype=torch.bool).scatter(1, probs.topk(k).indices, True)
    among_others = ~listed.gather(1, tokens.unsqueeze(1)).squeeze(1)
    given = functional.cross_entropy(logits.masked_fill(listed, -torch.inf), tokens, reduction="none")
    return _lumped(logits, probs, listed) + given.where(among_others, 0.0).mean()


def _lumped(logits: Tensor, probs: Tensor, listed: Tensor) -> Tensor:
    log_probs = logits.log_softmax(-1)
    rest = log_probs.masked_fill(listed, -torch.inf).logsumexp(-1)
    ours = probs * listed
    return -((ours * log_probs).sum(-1) + (1 - ours.sum(-1)).clamp(min=0) * rest).mean()


def following(logits: Tensor, probs: Tensor, tokens: Tensor, k: int) -> Tensor:
    top, indices = probs.topk(k)
    labels = torch.zeros_like(probs).scatter(1, indices, top)
    labels.scatter_add_(1, tokens.unsqueeze(1), (1 - top.sum(-1, keepdim=True)).clamp(min=0))
    return full(logits, labels, tokens, k)


def drawn(logits: Tensor, probs: Tensor, tokens: Tensor, k: int) -> Tensor:
    top, indices = probs.topk(k)
    labels = torch.zeros_like(probs).scatter(1, indices, top)
    labels.scatter_add_(1, tokens.unsqueeze(1), (~(indices == tokens.unsqueeze(1)).any(1, keepdim=True)).float())
    return full(logits, labels, tokens, k)


FORMS: dict[str, Loss] = {
    "renormalised": renormalised,
    "uniform": uniform,
    "other": other,
    "next": following,
    "drawn": drawn,
    "listed": listed,
    "observed": observed,
}


# ------------------------------------------------------------------------ figures


def on_labels(form: Loss, teacher: nn.Module, k: int) -> Callable[[nn.Module, Tensor], Tensor]:
    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        with torch.no_grad():
            probs = teacher(ids[:, :-1]).softmax(-1).flatten(0, 1)
        return form(model(ids[:, :-1]).flatten(0, 1), probs, ids[:, 1:].flatten(), k)

    return loss


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    return torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(model.parameters()))])


def distances(teacher: nn.Module, data: Tensor) -> dict[str, float]:
    """How far the gradient of each form is from the full labels', relative to it, along a training on full labels."""
    figures = {}
    model, after = student(0), 0
    for steps in (0, 50, 200):
        fit(model, steps - after, on_labels(full, teacher, 0), data, seed=after) if steps else None
        after, generator = steps, torch.Generator().manual_seed(7)
        batches = [batch(data, generator) for _ in range(6)]
        truth = [gradient(model, on_labels(full, teacher, 0)(model, ids)) for ids in batches]
        for name, form in {**FORMS, "hard": hard}.items():
            for k in TOPS if name != "hard" else (0,):
                found = [gradient(model, on_labels(form, teacher, k)(model, ids)) for ids in batches]
                away = [float((one - two).norm() / two.norm()) for one, two in zip(found, truth, strict=True)]
                figures[f"distance_{name}_k{k}_after_{steps}"] = statistics.mean(away)
    return figures


def trained(teacher: nn.Module, train: Tensor, test: Tensor, steps: int, seed: int) -> dict[str, float]:
    """What Students trained on each form of labels are worth on the held-out text."""
    forms = {"full": (full, 0), "hard": (hard, 0)}
    forms |= {f"{name}_k{k}": (form, k) for k in TOPS for name, form in FORMS.items()}
    arms = {name: Arm(student(seed), form, k, steps) for name, (form, k) in forms.items()}
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = batch(train, generator)
        with torch.no_grad():
            probs = teacher(ids[:, :-1]).softmax(-1).flatten(0, 1)
        for arm in arms.values():
            arm.step(ids, probs)
    figures = {f"bits_per_byte_{name}": bits(arm.model, test) for name, arm in arms.items()}
    return figures | {f"divergence_{name}": divergence(arm.model, teacher, test) for name, arm in arms.items()}


class Arm:
    """A Student in training on one form of labels."""

    def __init__(self, model: nn.Module, form: Loss, k: int, num_steps: int) -> None:
        self.model, self.form, self.k = model, form, k
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, num_steps)

    def step(self, ids: Tensor, probs: Tensor) -> None:
        self.optimizer.zero_grad()
        self.form(self.model(ids[:, :-1]).flatten(0, 1), probs, ids[:, 1:].flatten(), self.k).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step()


def pieces(data: Tensor) -> list[Tensor]:
    whole = data[: len(data) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    return list(whole.split(128))


@torch.no_grad()
def bits(model: nn.Module, data: Tensor) -> float:
    losses = [next_token_loss(model, ids) * len(ids) for ids in pieces(data)]
    return float(sum(losses)) / (len(data) // CONTEXT) / math.log(2)


@torch.no_grad()
def divergence(model: nn.Module, teacher: nn.Module, data: Tensor) -> float:
    """Bits that the Student's distribution costs over the Teacher's, of the tokens that the Teacher expects."""
    total = 0.0
    for ids in pieces(data):
        ours, theirs = (each(ids[:, :-1]).log_softmax(-1) for each in (model, teacher))
        total += float((theirs.exp() * (theirs - ours)).sum(-1).mean(1).sum())
    return total / (len(data) // CONTEXT) / math.log(2)


if __name__ == "__main__":
    main()
