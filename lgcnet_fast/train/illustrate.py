"""What a finished run looks like: predictions on val beside their labels, and its curves."""

from __future__ import annotations

from pathlib import Path

from lgcnet_fast.data.dataset import image_and_label
from lgcnet_fast.report.curves import draw_curves
from lgcnet_fast.report.pictures import contact_sheet, save_picture
from lgcnet_fast.train.metrics import read_metrics
from lgcnet_fast.train.predict_files import save_pictures
from lgcnet_fast.train.predictor import UnfoldedEngine
from lgcnet_fast.train.run import Run

SAMPLES = 6
"""Images of val that are drawn, evenly spread over the split."""

TRAINED_STAGES = ("search", "pretrain", "finetune")


def illustrate(run: Run) -> Path:
    """Fills RUN/predictions with samples and a contact sheet, whose path is returned, and draws
    RUN/curves.png. Raises `RunError` if the run has no trained network."""
    engine = UnfoldedEngine.open(run)
    dataset = run.dataset(run.config.data.val_split)
    count = min(SAMPLES, len(dataset))
    folder, rows = run.folder / "predictions", []
    for index in (place * len(dataset) // count for place in range(count)):
        image, label = image_and_label(dataset, index)
        [prediction] = engine.stream([image])
        save_pictures(folder, dataset.stem(index), image, prediction, run.classes)
        rows.append((dataset.stem(index), image, (label, prediction)))
    sheet = folder / "contact_sheet.png"
    save_picture(sheet, contact_sheet(rows, run.classes, ("image", "label", "prediction")))
    stages = {
        stage: read_metrics(run.stage_folder(stage) / "metrics.jsonl") for stage in TRAINED_STAGES
    }
    draw_curves(stages, run.folder / "curves.png")
    return sheet
