"""One domain of DomainNet.

Peng et al., "Moment Matching for Multi-Source Domain Adaptation", ICCV 2019.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from ...errors import InputError
from .folder import list_folder
from .listing import Listing, Record, bad_row, check_files, existing_folder, numbered_lines

logger = logging.getLogger(__name__)

_CLASSES = 345


def list_domainnet(root: Path) -> Listing:
    """List the folder of a domain, such as ``clipart/<class>/<file>``, by the official lists beside it.

    The lists are ``clipart_train.txt`` and ``clipart_test.txt``, with rows ``clipart/<class>/<file> <label>``; whether
    they are the original or the later "cleaned" ones shows in their length, which is logged. Without lists, a prepared
    folder ``clipart/{train,val}/<class>/<file>`` is read as :func:`~.folder.list_folder` does, its ``val`` being
    split ``test`` where there is no ``test``: it is made of the official test list.

    Args:
        root: the folder of the domain.

    Raises:
        InputError: for missing lists, malformed rows, labels outside of 0..344, photos that are not there, and labels
            whose folder is not one and the same.
    """
    root = Path(os.path.abspath(root))  # "." has no name
    existing_folder(root, "a domain of DomainNet")
    lists = {split: root.parent / f"{root.name}_{split}.txt" for split in ("train", "test")}
    lists = {split: path for split, path in lists.items() if path.exists()}
    if not lists:
        return _prepared(root)
    rows = {split: _read(path, root.name) for split, path in lists.items()}
    labels = _labels(rows)
    total = sum(map(len, rows.values()))
    logger.info("%s: lists of %d images, %s", root, total, ", ".join(path.name for path in lists.values()))
    return Listing(
        name="domainnet",
        root=root,
        labels=labels,
        splits={split: partial(_records, root, found, lists[split]) for split, found in rows.items()},
        upright=False,
        hints={
            split: f"add the list {root.parent / f'{root.name}_{split}.txt'}" for split in ("train", "test")
        },
    )


def is_domain(path: Path) -> bool:
    """Whether the official lists of DomainNet lie beside a folder."""
    path = Path(os.path.abspath(path))
    lists = [path.parent / f"{path.name}_{split}.txt" for split in ("train", "test")]
    if not all(list_path.is_file() for list_path in lists):
        return False
    with lists[0].open("rb") as file:
        return file.readline().startswith(os.fsencode(f"{path.name}/"))


def _prepared(root: Path) -> Listing:
    # A class of DomainNet is called "train", so a folder of that name proves nothing; two splits do.
    if not (root / "train").is_dir() or not any((root / split).is_dir() for split in ("val", "test")):
        domains = sorted(path.name.removesuffix("_train.txt") for path in root.glob("*_train.txt"))
        remedy = (
            f"name one of its domains, such as {root / domains[0]}"
            if domains
            else "add the lists beside the folder"
        )
        raise InputError(
            f"{root}: neither {root.name}_train.txt or {root.name}_test.txt beside it nor train/ and val/ in it, "
            f"expected one domain of DomainNet; {remedy}"
        )
    listing = list_folder(root)
    splits = dict(listing.splits)
    if "test" not in splits:
        splits["test"] = splits.pop("val")
    return replace(listing, name="domainnet", splits=splits, upright=False)


def _read(path: Path, domain: str) -> dict[str, tuple[int, str]]:
    """For each image ``<class>/<file>``, its label and the place of its row."""
    form = f"{domain}/<class>/<file> <label 0..{_CLASSES - 1}>"
    rows: dict[str, tuple[int, str]] = {}
    for number, line in numbered_lines(path):
        name, _, label = line.strip().rpartition(" ")
        parts = name.split("/")
        if len(parts) != 3 or parts[0] != domain or not label.isdecimal() or int(label) >= _CLASSES:
            raise bad_row(path, number, line, form)
        image_id = "/".join(parts[1:])
        if image_id in rows:
            raise InputError(f"{path}:{number}: second row of {name}, expected one; remove one")
        rows[image_id] = int(label), f"{path}:{number}"
    return rows


def _labels(rows: Mapping[str, Mapping[str, tuple[int, str]]]) -> list[str]:
    names: dict[int, str] = {}
    numbers: dict[str, int] = {}
    for found in rows.values():
        for image_id, (label, where) in found.items():
            name = image_id.split("/")[0]
            if names.setdefault(label, name) != name or numbers.setdefault(name, label) != label:
                raise InputError(
                    f"{where}: the folder {name} has label {label}, but before {names[label]} had {label} or {name} "
                    f"had {numbers.get(name, label)}; correct one"
                )
    return [names.get(label, str(label)) for label in range(max(names, default=-1) + 1)]


def _records(root: Path, rows: Mapping[str, tuple[int, str]], source: Path) -> list[Record]:
    records = [
        Record(image_id=image_id, path=os.path.join(root, image_id), label=label)
        for image_id, (label, _) in rows.items()
    ]
    check_files(records, source)
    return records
