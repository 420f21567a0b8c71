"""Film ratings grouped by user: lists are ranked, NDCG@10 of Student and TA against a tuned baseline.

Each user's ratings are shared out at random: 70% to train on, 15% to choose settings by, 15% to report. A list is
what a user rated in a part: in training up to 20 films of it, drawn anew in each pass, in the other two all of them.
All arms learn by `Listwise` from gains of 2^stars - 1, which are NDCG's too. They see the film's genres, and the mean
gain and the number of its ratings by others in the training part. Scores begin at that mean, which alone, without a
model, is a reference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, Final, final

import torch
from jaxtyping import Float, Int
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from matta.nesting.layout import Layout
from matta.nesting.nested import nest
from matta.objectives import Listwise
from matta_studies.experiment import Arm, Found, Job, Measured, Plan, RunJobs, conduct, plain
from matta_studies.intervals import change_of, mean_and_reach
from matta_studies.labelled_films import Ratings, load_ratings
from matta_studies.presentation import Notes, Part, Table, chosen_table, report, told_machine
from matta_studies.rankers import RankerSize
from matta_studies.study_settings import RankingSettings
from matta_studies.trials import BASELINE, STUDENT, TA, Method, Trial, count_parameters, descend, models_of, step_of
from matta_studies.tuning import Search
from matta_studies.worker_pool import counted

DATA_FILE: Final = "lists.safetensors"
CUTOFF: Final = 10
FEW: Final = 5.0  # ratings of a film weigh as much as the mean of all films
EVALUATION_BATCH: Final = 128
PADDING: Final = -100
SHARES: Final = (0.7, 0.15)  # of a user's ratings: to train on, to choose settings by; the rest is reported
FIRST_FRESH_SEED: Final = 9000
SEARCH: Final = Search(num_screening_seeds=2, num_finalists=4)


@final
@dataclass(frozen=True, kw_only=True)
class Lists:
    """Rated films in lists of users, padded to the longest: what is known of each film, its gain, -100 for padding."""

    user: Int[Tensor, " lists"]
    film: Int[Tensor, "lists items"]
    features: Float[Tensor, "lists items features"]
    gain: Float[Tensor, "lists items"]

    def __len__(self) -> int:
        return len(self.user)

    def batches(self, size: int) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
        """Some lists at a time: the rows of the tables of users and films, with the features; and the gains."""
        ids = torch.stack([self.user.unsqueeze(1).expand_as(self.film), self.film], dim=2)
        parts = (each.split(size) for each in (ids, self.features, self.gain))
        return (((rows, features), gain) for rows, features, gain in zip(*parts, strict=True))

    def drawn(self, generator: torch.Generator, num_items: int) -> Lists:
        """A list of each user, of up to as many of their films, all in an order of the generator's."""
        keys = torch.rand(self.film.shape, generator=generator) + (self.gain == PADDING)
        items = keys.argsort(1)[:, :num_items]
        rows = torch.randperm(len(self), generator=generator)
        film, gain = (each.gather(1, items)[rows] for each in (self.film, self.gain))
        features = self.features.gather(1, items.unsqueeze(2).expand(-1, -1, self.features.shape[2]))[rows]
        return Lists(user=self.user[rows], film=film, features=features, gain=gain)


@final
@dataclass(frozen=True, kw_only=True)
class ListData:
    """The three parts."""

    num_rows: tuple[int, int]
    train: Lists
    validation: Lists
    test: Lists


@final
class ListRanker(nn.Module):
    """Scores of the items of lists: the film's mean gain, and what its user, the film and its features add to that.

    Example:
        >>> model = ListRanker((3, 5), 1, RankerSize(embedding=2, hidden=(4,)))
        >>> model(torch.zeros(7, 6, 2, dtype=torch.long), torch.zeros(7, 6, 1)).shape
        torch.Size([7, 6])
    """

    def __init__(self, num_rows: tuple[int, int], num_features: int, size: RankerSize) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, size.embedding) for rows in num_rows)
        for table in self.tables.parameters():
            nn.init.normal_(table, std=0.1)
        self.mlp = size.network(len(num_rows) * size.embedding + num_features)

    def forward(
        self, ids: Int[Tensor, "lists items two"], features: Float[Tensor, "lists items features"]
    ) -> Float[Tensor, "lists items"]:
        rows = [table(ids[..., column]) for column, table in enumerate(self.tables)]
        return features[..., 0] + self.mlp(torch.cat([*rows, features], dim=-1)).squeeze(-1)


@final
@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is equal for all arms."""

    size: RankerSize = field(default_factory=lambda: RankerSize(embedding=8, hidden=(32, 16)))
    batch: int = 64
    items: int = 20


@final
@dataclass(frozen=True, kw_only=True)
class ListTrial(Trial):
    """AdamW, whose rate falls to zero over the passes; L_D comes in over the first tenth of the steps."""

    weight_decay: float
    passes: int = 20

    def told_rates(self) -> str:
        return f", weight decay {self.weight_decay:g}, {self.passes} passes"


def _arm(name: str, title: str, method: Method) -> Arm:
    """An arm: each has one grid of rates, weight decays and passes; ω₃ is 1."""
    grid = product((0.001, 0.003, 0.01), (1.0, 3.0, 10.0, 15.0), (3, 10))
    return Arm(
        name=name,
        title=title,
        trials=tuple(
            ListTrial(method=method, optimizer="adamw", lr=lr, weight_decay=decay, passes=passes)
            for lr, decay, passes in grid
        ),
    )


ARMS: Final = (_arm(BASELINE, "baseline alone", "baseline"), _arm("matta", "MatTA", "matta"))
CHANGES: Final[Mapping[str, tuple[str, str, str]]] = {
    "student_vs_baseline": ("matta", STUDENT, BASELINE),
    "ta_vs_baseline": ("matta", TA, BASELINE),
}


@final
@dataclass(frozen=True, kw_only=True)
class RankingPlan(Plan):
    """What `RankingSettings` asks for, spelled out."""

    arms: tuple[Arm, ...] = ARMS
    setting: Setting = field(default_factory=Setting)
    first_seed: int = FIRST_FRESH_SEED
    search: Search | None = SEARCH


def plan_of(settings: RankingSettings) -> RankingPlan:
    """The plan behind the settings of the command line."""
    plan = RankingPlan(num_seeds=settings.num_seeds)
    return replace(plan, search=Search(seeds=SEARCH.seeds[:1], num_trials=4)) if settings.quick else plan


def make_data() -> ListData:
    """The ratings of films that were rated at least ten times, as lists of their users."""
    ratings = load_ratings()
    generator = torch.Generator().manual_seed(0)
    gain = 2.0**ratings.stars - 1
    parts: list[list[tuple[int, Tensor]]] = [[], [], []]
    for user in range(ratings.num_users):
        rows = (ratings.user == user).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        ends = [int(len(rows) * sum(SHARES[: n + 1])) for n in range(2)]
        for part, own in zip(parts, rows.tensor_split(ends), strict=True):
            part.append((user, own))
    seen = torch.cat([own for _, own in parts[0]])
    known = [_features(ratings, gain, seen, own) for own in (True, False, False)]
    made = [_padded(part, ratings.film, features, gain) for part, features in zip(parts, known, strict=True)]
    return ListData(num_rows=(ratings.num_users, ratings.num_films), train=made[0], validation=made[1], test=made[2])


def _features(ratings: Ratings, gain: Tensor, seen: Tensor, own: bool) -> Float[Tensor, "ratings features"]:
    """Each rating's film: its genres, the mean gain and the number of ratings `seen`, without its `own` one."""
    film, mean = ratings.film, gain[seen].mean()
    count = torch.bincount(film[seen], minlength=ratings.num_films)[film].float() - float(own)
    total = torch.bincount(film[seen], weights=gain[seen], minlength=ratings.num_films)[film].float() - own * gain
    drawn = (total + FEW * mean) / (count + FEW)
    return torch.cat([(drawn / mean - 1)[:, None], count.clamp(min=0).log1p()[:, None] / 3, ratings.genres[film]], 1)


def _padded(lists: list[tuple[int, Tensor]], film: Tensor, features: Tensor, gain: Tensor) -> Lists:
    """Lists of at least two items that differ in gain: others say nothing of an order."""
    kept = [(user, rows) for user, rows in lists if len(gain[rows].unique()) > 1]

    def pad(values: Tensor, filled: float) -> Tensor:
        return nn.utils.rnn.pad_sequence([values[rows] for _, rows in kept], batch_first=True, padding_value=filled)

    users = torch.tensor([user for user, _ in kept])
    return Lists(user=users, film=pad(film, 0), features=pad(features, 0.0), gain=pad(gain, PADDING))


def save_data(data: ListData, path: Path) -> None:
    """Write the lists to a file."""
    parts = {f"{part}.{name}": value for part in PARTS for name, value in vars(getattr(data, part)).items()}
    save_file({**parts, "num_rows": torch.tensor(data.num_rows)}, path)


PARTS: Final = ("train", "validation", "test")


def read_data(folder: Path) -> ListData:
    """What `save_data` has put there."""
    found = load_file(folder / DATA_FILE)
    users, films = found["num_rows"].tolist()
    names = [each.name for each in dataclasses.fields(Lists)]
    parts = {part: Lists(**{name: found[f"{part}.{name}"] for name in names}) for part in PARTS}
    return ListData(num_rows=(users, films), **parts)


def run_job(job: Job, data: ListData) -> Measured:
    """Train and score: 1 - NDCG@10. A pair is tuned by the mean of its models: both are served."""
    model = train(job.training.trial, data, job.training.setting, job.seed)
    models: dict[str, dict[str, Any]] = {
        name: {part: 1.0 - ndcg(module, getattr(data, part)) for part in ("validation", "test")}
        | {"parameters": count_parameters(module)}
        for name, module in models_of(model).items()
    }
    return {"tuning": fmean(each["validation"] for each in models.values()), "models": models}


def train(trial: ListTrial, data: ListData, setting: Setting, seed: int) -> nn.Module:
    """A baseline, or a Student in its TA (`Nested`), after all passes."""
    torch.manual_seed(seed)
    num_features, small, large = data.train.features.shape[2], setting.size, setting.size.grown()
    model: nn.Module = ListRanker(data.num_rows, num_features, small)
    if trial.method != "baseline":
        parts = [(small.embedding, large.embedding)] * 2 + [(num_features, num_features)]
        ta = ListRanker(data.num_rows, num_features, large)
        model = nest(model, ta, layouts={"mlp.0.weight": Layout.concat(parts, axis=1)})
    steps = trial.passes * -(-len(data.train) // setting.batch)
    step = step_of(model, Listwise(PADDING), trial, steps // 10)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=trial.lr, betas=(0.9, 0.99), weight_decay=trial.weight_decay, fused=True
    )
    batches = _batches(data.train, trial.passes, setting, torch.Generator().manual_seed(seed))
    for _ in descend(step, optimizer, lambda step: max(0.0, 1.0 - step / steps), batches):
        pass
    return model.eval()


def _batches(
    part: Lists, passes: int, setting: Setting, generator: torch.Generator
) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
    """A list of every user once in each pass."""
    for _ in range(passes):
        yield from part.drawn(generator, setting.items).batches(setting.batch)


@torch.no_grad()
def ndcg(scores_of: Callable[[Tensor, Tensor], Tensor], lists: Lists, cutoff: int = CUTOFF) -> float:
    """NDCG@10 (Järvelin and Kekäläinen 2002): the sum of gain / log2(1 + rank), over that of the best order.

    The mean over the lists.

    Example:
        >>> gain = torch.tensor([[1.0, 3.0, -100.0]])
        >>> known = torch.tensor([[[2.0], [0.0], [1.0]]])
        >>> lists = Lists(user=torch.tensor([0]), film=torch.tensor([[2, 0, 1]]), features=known, gain=gain)
        >>> round(ndcg(lambda ids, known: known[..., 0], lists), 4)  # (1 + 3/1.585) / (3 + 1/1.585)
        0.7967
    """
    present = lists.gain != PADDING
    gain = lists.gain.where(present, 0.0).double()
    found = torch.cat([scores_of(*inputs) for inputs, _ in lists.batches(EVALUATION_BATCH)])
    scores = found.double().masked_fill(~present, -torch.inf)
    discount = 1 / (torch.arange(min(cutoff, gain.shape[1]), dtype=torch.float64) + 2).log2()

    def discounted(order: Tensor) -> Tensor:
        return (gain.gather(1, order[:, : len(discount)]) * discount).sum(1)

    best = discounted(gain.argsort(1, descending=True))
    return float((discounted(scores.argsort(1, descending=True)) / best).mean())


def run(settings: RankingSettings) -> dict[str, Any]:
    """The study; its figures, which also stand in `results.json` of the run folder.

    Raises:
        RunError: the run folder exists.
    """

    def study(run_jobs: RunJobs, folder: Path, console: Console) -> dict[str, Any]:
        return run_study(plan_of(settings), make_data(), run_jobs, folder, console)

    return conduct("ranking", settings.out, prepare=_prepare, load=read_data, run_job=run_job, study=study)[1]


def _prepare(folder: Path, console: Console) -> str:
    save_data(make_data(), folder / DATA_FILE)
    return "ratings in lists of users"


def run_study(plan: RankingPlan, data: ListData, run_jobs: RunJobs, folder: Path, console: Console) -> dict[str, Any]:
    """Tune, and run the fresh seeds; all files of the run are written to `folder`."""
    with counted(run_jobs, plan.num_arm_runs, console) as run_counted:
        found = plan.run(run_counted, "test")
    results = results_of(plan, found) | {"film_mean_ndcg": ndcg(lambda ids, features: features[..., 0], data.test)}
    report(results, told(results), folder, console)
    return results


def results_of(plan: RankingPlan, found: Found) -> dict[str, Any]:
    """Everything that the study found, in types that JSON gives back as they are."""
    summary = found.summary(found.changes(CHANGES), "validation_ndcg_loss")
    losses = summary.pop("aucloss")  # as the other studies have it
    ndcgs = {
        arm: {model: _with_interval([1 - loss for loss in each["seeds"]]) for model, each in models.items()}
        for arm, models in losses.items()
    }
    parameters = {model: found.losses("matta", model, "parameters")[0] for model in found.models("matta")}
    setting = dataclasses.asdict(plan.setting)
    return plain(summary | {"ndcg": ndcgs, "parameters": parameters, "setting": setting})


def _with_interval(values: list[float]) -> dict[str, Any]:
    mean, reach = mean_and_reach(values)
    return {"mean": mean, "interval": [mean - reach, mean + reach], "seeds": values}


def told(results: Mapping[str, Any]) -> list[Part]:
    """The section of docs/results.md."""
    names = {(arm, model): name for name, (arm, model, _) in CHANGES.items()}
    rows = [("the film's mean gain", "–", f"{results['film_mean_ndcg']:.4f}", "–")]
    for arm, models in results["ndcg"].items():
        for model, each in models.items():
            low, high = each["interval"]
            name = names.get((arm, model))
            change = str(change_of(results, name)) if name else "–"
            rows.append((results["titles"][arm], model, f"{each['mean']:.4f} [{low:.4f}, {high:.4f}]", change))
    tried = len(next(iter(results["tried"].values()), []))
    return [
        "## Lists: films ranked for each user",
        f"`matta study ranking`: {results['num_seeds']} fresh seeds, {tried} trials of each arm; "
        f"{told_machine(results['machine'])}.",
        Table(
            title="NDCG@10 of held-out ratings (more is better)",
            columns=("arm", "model", "NDCG@10 [95%]", "change of 1 − NDCG@10 [95%]"),
            rows=rows,
        ),
        Notes([_verdict(results, name, model) for name, (_, model, _) in CHANGES.items()]),
        chosen_table(results, "chosen"),
    ]


def _verdict(results: Mapping[str, Any], name: str, model: str) -> str:
    change = change_of(results, name)
    if not change.is_certain:
        return f"{model}: no difference from the baseline that is certain at 95%."
    side = "better" if change.mean < 0 else "worse"
    return f"{model}: {side} than the baseline, by {abs(change.mean):.2f}% of 1 − NDCG@10."
