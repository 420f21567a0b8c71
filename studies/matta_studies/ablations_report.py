"""What the ablations say: the tables of claims and of variants, sentences, and the picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from matta_studies.ablation_variants import BASELINE, BOTH, MATTA, SHAMPOO
from matta_studies.intervals import Change
from matta_studies.presentation import Notes, Part, Table, canvas, draw_changes, paper_figure, told_machine
from matta_studies.rankers import RankerSize
from matta_studies.trials import STUDENT, TA

COLUMNS: Final = (
    "variant",
    "rate",
    "TA parameters",
    "Student against alone",
    "Student against the reference",
    "TA against alone",
    "TA against the reference",
)
CLAIM_COLUMNS: Final = ("what the paper says", "paper", "ours [95%]", "")
EDGE: Final = "°"


def told(results: Mapping[str, Any]) -> list[Part]:
    """The section as it stands in the documentation."""
    parts: list[Part] = [
        "## Ablations",
        _protocol(results),
        "![Changes with intervals of every variant](ablations.png)",
    ]
    for study in results["studies"].values():
        title = study["title"]
        claims = Table(title=f"{title}: the paper's tables and ours", columns=CLAIM_COLUMNS, rows=claim_rows(study))
        variants = Table(title=f"{title}: changes of AucLoss", columns=COLUMNS, rows=variant_rows(study))
        parts += [f"### {title}: what the paper says", _sizes(study), claims, Notes([tally(study)])]
        parts += [f"### {title}: every variant", variants, Notes(sentences(study))]
    return parts


def claim_rows(study: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The cells of the table of claims."""
    return [
        (claim["told"], paper_figure(claim["paper"]), told_change(claim), claim["verdict"]) for claim in study["claims"]
    ]


def told_change(figure: dict[str, Any] | None) -> str:
    """A change with its interval, or a dash."""
    return "–" if figure is None else str(Change.told(figure))


def groups_of(study: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The variants by group."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for each in study["variants"].values():
        groups.setdefault(each["group"], []).append(each)
    return groups


def variant_rows(study: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The cells of the table of variants, a row of its own for each group's name."""
    found: list[tuple[str, ...]] = []
    for group, variants in groups_of(study).items():
        found.append((f"**{group}**", *[""] * (len(COLUMNS) - 1)))
        for each in variants:
            alone, reference = each["vs_alone"], each["vs_reference"] if each["alone"] != each["reference"] else {}
            changes = [told_change(figures.get(model)) for model in (STUDENT, TA) for figures in (alone, reference)]
            parameters = f"{each['parameters']['TA']:,}" if "TA" in each["parameters"] else "–"
            rate = f"{each['rate']:g}{EDGE if each['rate_at_edge'] else ''}"
            found.append((each["title"], rate, parameters, *changes))
    return found


def sentences(study: Mapping[str, Any]) -> list[str]:
    """Which variants of each group but the first differ from their reference by more than the interval."""
    found = []
    for group, variants in list(groups_of(study).items())[1:]:
        compared = [
            (each["title"], model, Change.told(change))
            for each in variants
            for model, change in each["vs_reference"].items()
        ]
        clear = [
            f"with “{title}” the {model} is {'better' if change.mean < 0 else 'worse'} ({change})"
            for title, model, change in compared
            if change.is_certain
        ]
        rest = len(compared) - len(clear)
        told = f"{rest} of {len(compared)} changes cannot be told from none"
        found.append(f"{group}: {'; '.join([*clear, told] if rest else clear)}.")
    return found


def tally(study: Mapping[str, Any]) -> str:
    """How many of the paper's statements are seen, and which are not."""
    told = {
        end: [claim["told"] for claim in study["claims"] if claim["verdict"].startswith(end)]
        for end in ("seen", "not seen", "cannot")
    }
    opposite = f" ({'; '.join(told['not seen'])})" if told["not seen"] else ""
    return (
        f"Of these {len(study['claims'])} statements {len(told['seen'])} are seen, {len(told['not seen'])} are the "
        f"other way round{opposite}, and {len(told['cannot'])} cannot be told from no difference by "
        f"{study['num_seeds']} seeds."
    )


def _protocol(results: Mapping[str, Any]) -> str:
    """The command, and what it ran."""
    studies = results["studies"]
    option = "" if len(studies) == 2 else f" --study {next(iter(studies))}"
    seeds = ", ".join(
        f"{study['title'].lower()} {study['num_seeds']} ({study['first_seed']} and up)" for study in studies.values()
    )
    compared = sum(
        len(each["vs_alone"]) + len(each["vs_reference"])
        for study in studies.values()
        for each in study["variants"].values()
    )
    quick = " --quick" if results["quick"] else ""
    return (
        f"`matta study ablations{option}{quick}`. Changes of AucLoss in percent, less is better; 95% intervals, paired "
        f"over fresh seeds: {seeds}. {' '.join(_tuning(study) for study in studies.values())} But for the two lines "
        f"that say first order, the optimizer is Shampoo. “Against alone”: a Student of the same architecture and "
        f"optimizer trained alone (the first group: with the first-order optimizer). “The reference”: MatTA with "
        f"Shampoo, the fourth line; for depth the TA that is as deep as the Student. Of {compared} intervals one in "
        f"twenty lies off zero by chance. {told_machine(results['machine'])}."
    )


def _tuning(study: Mapping[str, Any]) -> str:
    """How rates were chosen."""
    search = study["search"]
    if search is None:
        return f"{study['title']}: not tuned in this run; the rates are those that the study has chosen."
    further = len(search["seeds"]) - search["num_screening_seeds"]
    judged = f", the best {search['num_finalists']} with {further} more" if further else ""
    return (
        f"{study['title']}: every variant has three rates to choose from, around one that the study has chosen, tried "
        f"with one tuning seed{judged} ({EDGE}: the lowest or highest of the three was chosen)."
    )


def _sizes(study: Mapping[str, Any]) -> str:
    """Sizes of the reference, and how it was trained."""
    variants, both = study["variants"], study["variants"][BOTH]
    baseline, shampoo = (
        f"{variants[name]['aucloss'][STUDENT]['mean']:.5f} ({variants[name]['chosen']})" for name in (BASELINE, SHAMPOO)
    )
    return (
        f"Student of {both['parameters'][STUDENT]:,} parameters, TA of {both['parameters'][TA]:,} (MLP "
        f"{RankerSize(**study['ta'])}). AucLoss of the Student alone {baseline}, with Shampoo {shampoo}; MatTA first "
        f"order: {variants[MATTA]['chosen']}; with Shampoo: {both['chosen']}."
    )


def draw_forest(results: Mapping[str, Any], path: Path) -> None:
    """A panel for each study: every variant's Student and TA against a Student trained alone, with intervals."""
    studies = list(results["studies"].values())
    rows = max(len(variant_rows(study)) for study in studies)
    with canvas(path, (8 * len(studies), 0.26 * rows + 1.2), columns=len(studies)) as panels:
        for axes, study in zip(panels, studies, strict=True):
            found: list[tuple[str, Mapping[str, Any] | None]] = []
            for group, variants in groups_of(study).items():
                found += [(group, None), *((each["title"], each["vs_alone"]) for each in variants)]
            draw_changes(axes, study["title"], found)
