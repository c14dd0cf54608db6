"""The card of a published model: what a run knows about its weights, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .files import write_text

CARD_FILE = "README.md"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One measured number, with all that is needed to compare it with another.

    Attributes:
        name: such as ``"GT-known Loc"``; value: as it is printed, in ``unit``.
        data: name of the data set; split: part of it that was measured.
        protocol: exact definition, where several exist.
        std: standard deviation over ``seeds``.
        published: the paper's number, in the same unit.
        unit: ``"%"`` or another; empty for plain numbers.
        dataset_id: identifier on the Hub, if the data has one.
    """

    name: str
    value: float
    data: str
    split: str | None = None
    protocol: str | None = None
    std: float | None = None
    seeds: Sequence[int] = ()
    published: float | None = None
    unit: str = "%"
    dataset_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card says. What is not known stays out of it.

    Attributes:
        model_class, package: where the model comes from, for the lines that load it.
        repo_id: folder or ``owner/name`` that those lines name; default: the card's folder.
        title, summary, limits: text, Markdown.
        license: of the weights, an identifier of the Hub such as ``"apache-2.0"``.
        tags, library_name, pipeline_tag, datasets, base_model: search terms of the Hub.
        paper: address or citation key; citation: BibTeX.
        metrics: the results.
        recipe, train_command, evaluate_command: how to get them again.
        seeds, hardware, duration, commit, versions: how they were got.
        labels: class names.
    """

    model_class: str
    package: str
    repo_id: str | None = None
    title: str | None = None
    summary: str | None = None
    limits: str | None = None
    license: str | None = None
    tags: Sequence[str] = ()
    library_name: str | None = None
    pipeline_tag: str = "object-detection"
    datasets: Sequence[str] = ()
    base_model: str | None = None
    paper: str | None = None
    citation: str | None = None
    metrics: Sequence[Metric] = ()
    recipe: str | None = None
    train_command: str | None = None
    evaluate_command: str | None = None
    seeds: Sequence[int] = ()
    hardware: str | None = None
    duration: str | None = None
    commit: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    labels: Sequence[str] = ()


def write_card(folder: str | Path, facts: CardFacts | Mapping[str, Any]) -> Path:
    """Write ``README.md`` with its front matter into a model folder, replacing an older one.

    Args:
        folder: the model folder.
        facts: a :class:`CardFacts`, or its fields as a dict (metrics may be dicts too).

    Returns:
        Path of the card.

    Raises:
        ValueError: for a field that :class:`CardFacts` does not have.

    Example:
        >>> import tempfile
        >>> metric = {"name": "GT-known Loc", "value": 71.23, "std": 0.4, "seeds": [0, 1], "data": "CUB"}
        >>> facts = {"model_class": "SCM", "package": "scm_wsol", "metrics": [metric]}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     card = write_card(folder, facts)
        ...     print([line for line in card.read_text().splitlines() if line.startswith("| GT")][0])
        | GT-known Loc | CUB | 71.2 ± 0.4 % | 0, 1 |
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    folder = Path(folder)
    facts = facts if isinstance(facts, CardFacts) else _from_mapping(facts)
    package = facts.package.replace("_", "-")
    repo_id = facts.repo_id or folder.resolve().name
    title = facts.title or f"{facts.model_class}: {Path(repo_id).name}"
    results = [
        EvalResult(
            task_type=facts.pipeline_tag,
            dataset_type=metric.dataset_id or _slug(metric.data),
            dataset_name=metric.data,
            dataset_split=metric.split,
            metric_type=_slug(metric.name),
            metric_name=f"{metric.name} ({metric.protocol})" if metric.protocol else metric.name,
            metric_value=metric.value,
            metric_args=_known(
                protocol=metric.protocol,
                unit=metric.unit,
                std=metric.std,
                seeds=list(metric.seeds),
                published=metric.published,
            ),
        )
        for metric in facts.metrics
    ]
    data = ModelCardData(
        license=facts.license,
        library_name=facts.library_name or package,
        pipeline_tag=facts.pipeline_tag,
        tags=sorted({*facts.tags, package}),
        datasets=list(facts.datasets) or None,
        base_model=facts.base_model,
        model_name=title if results else None,
        eval_results=results or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("model_card_template.md")),
        facts=replace(facts, repo_id=repo_id, title=title),
        table=_results_table(facts.metrics),
        training=_training_list(facts),
        commands=_known(Train=facts.train_command, Evaluate=facts.evaluate_command),
        labels=", ".join(facts.labels),
    )
    path = folder / CARD_FILE
    write_text(path, f"{card}\n")
    return path


def _from_mapping(values: Mapping[str, Any]) -> CardFacts:
    metrics = [
        m if isinstance(m, Metric) else Metric(**_checked(Metric, m)) for m in values.get("metrics", ())
    ]
    return CardFacts(**_checked(CardFacts, {**values, "metrics": metrics}))


def _checked(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    names = [known.name for known in fields(kind)]
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {unknown[0]!r}; expected some of {', '.join(names)}")
    return dict(values)


def _results_table(metrics: Sequence[Metric]) -> str:
    """A Markdown table of the columns that hold anything."""
    columns = {
        "metric": [metric.name for metric in metrics],
        "data": [f"{metric.data}, {metric.split}" if metric.split else metric.data for metric in metrics],
        "protocol": [metric.protocol or "" for metric in metrics],
        "ours": [_number(metric.value, metric.unit, metric.std) for metric in metrics],
        "published": [_number(metric.published, metric.unit) for metric in metrics],
        "seeds": [", ".join(map(str, metric.seeds)) for metric in metrics],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    rows = [list(columns), ["---"] * len(columns), *zip(*columns.values())]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows if columns)


def _training_list(facts: CardFacts) -> str:
    known = _known(
        Recipe=facts.recipe,
        Seeds=", ".join(map(str, facts.seeds)),
        Hardware=facts.hardware,
        Duration=facts.duration,
        Commit=facts.commit and f"`{facts.commit}`",
        Versions=", ".join(f"{name} {version}" for name, version in facts.versions.items()),
        Paper=facts.paper,
    )
    return "\n".join(f"- {name}: {text}" for name, text in known.items())


def _number(value: float | None, unit: str, std: float | None = None) -> str:
    if value is None:
        return ""
    digits = 1 if unit == "%" else 4
    spread = "" if std is None else f" ± {std:.{digits}f}"
    return f"{value:.{digits}f}{spread} {unit}".strip()


def _known(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value not in (None, "", [])}


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
