"""What a run leaves for people: metrics, model card and report.html."""
from __future__ import annotations
from pathlib import Path
from attnmap_core.files import atomic_folder, write_json
def write_run(run, config, model, data, evaluation, result):
    with atomic_folder(run / "model") as folder:
        model.save_pretrained(folder)
    write_json(run / "metrics.json", evaluation.to_json())
def write_evaluation_report(*a, **k): ...
