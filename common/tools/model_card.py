"""A model folder's README.md: what the model is, how it was made and how good it is, as the Hugging Face Hub reads it."""

import json
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from common import UserError
from common.config import RESUME_MAY_CHANGE
from common.model.pretrained_cfg import SMALL_STEM, PretrainedCfg
from common.run.progress import clock

# Classes up to which all are listed; of more, the worst by F1.
MOST_CLASSES = 20
LIMITS = """- It gives one of its {count} classes to every image, also to one that shows none of them.
- Its accuracy is that of images like those it was trained on; other cameras, places or times may lower it.
- Nobody has looked at how its mistakes are shared out among groups of people, places or makers of images.
"""
CHOSEN = (
    "- The best epoch was chosen on the validation images, so that their accuracy flatters it a little.\n"
)


@dataclass(frozen=True)
class Card:
    """What a card is made from."""

    repo: str | None  # where on the Hub it will be
    name: str  # of the model, elsewhere
    cfg: PretrainedCfg
    weights: str  # their fingerprint
    parameters: int
    run: Path | None  # the folder of the run that made it
    evaluation: Path | None  # a folder that `evaluate` wrote
    license: str  # as the Hub names it
    gaps: Mapping[str, float]  # of each program, by its file's name: the largest difference to PyTorch
    normalized: bool  # the programs take images that are normalised already


def write_card(folder: Path, card: Card) -> None:
    """Write README.md and its pictures into a model's folder.

    UserError: the run has no whole epoch, or the evaluation is another model's.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    record = read_record(card.run) if card.run else {}
    dataset = public_name(record["config"]["data_dir"]) or "built-in sample images" if record else ""
    results = None
    if record:
        result = EvalResult(
            task_type="image-classification",
            dataset_type="image-classification",
            dataset_name=dataset,
            dataset_split="validation",
            metric_type="accuracy",
            metric_name="top-1",
            metric_value=round(record["progress"]["best_top1"] / 100, 4),
        )
        results = [result]
    timms = not card.cfg.architecture.endswith(SMALL_STEM)
    data = ModelCardData(
        license=card.license,
        library_name="timm" if timms else None,
        pipeline_tag="image-classification",
        tags=["image-classification", *(["timm"] if timms else []), card.cfg.architecture],
        metrics=["accuracy"],
        model_name=card.name,
        eval_results=results,
    )
    parts = [
        opening(card, record, dataset),
        use(f"hf-hub:{card.repo}" if card.repo else f"local-dir:{card.name}") if timms else "",
        programs(card) if card.gaps else "",
        curve(folder, card.run) if card.run else "",
        per_class(folder, card) if card.evaluation else "",
        data_section(card.cfg, record, dataset),
        training(folder, card.run, record) if card.run else "",
        "## Limitations\n\n" + LIMITS.format(count=len(card.cfg.classes)) + (CHOSEN if record else ""),
    ]
    content = f"---\n{data}\n---\n\n" + "\n\n".join(filter(None, parts))
    ModelCard(content).save(folder / "README.md")


def read_record(run: Path) -> dict[str, Any]:
    """What a run's newest checkpoint says of it: progress, settings and stages in force; and its summary, if it is finished.

    UserError: it has no checkpoint.
    """
    states = sorted((run / "checkpoints").glob("step_*/state.json"))
    if not states:
        raise UserError(
            f"{run} has no checkpoint that tells how it was trained; pass {run / 'model'} instead"
        )
    summary = run / "summary.json"
    finished = json.loads(summary.read_text()) if summary.is_file() else {}
    return {**json.loads(states[-1].read_text()), "summary": finished}


def public_name(place: str) -> str:
    """A dataset's or file's name without the folders of this machine, or the bucket, in which it lies."""
    on_hub = re.fullmatch(r"\w[\w.-]*/[\w.-]+", place) and not Path(place).exists()
    return place if on_hub else Path(place).name


def opening(card: Card, record: Mapping[str, Any], dataset: str) -> str:
    cfg = card.cfg
    text = (
        f"# {card.name}\n\n{cfg.architecture} ({card.parameters / 1e6:.1f} M parameters) that sorts images into "
        f"{len(cfg.classes)} classes, seen at {cfg.img_size} × {cfg.img_size} px"
    )
    if not record:
        return f"{text}."
    progress = record["progress"]
    return (
        f"{text}. On the validation images of {dataset}, {progress['best_top1']:.2f} % are right (top-1, "
        f"epoch {progress['best_epoch']} of {progress['epochs_done']})."
    )


def use(address: str) -> str:
    """The lines that load the model and name what is on an image; run where its folder lies, or anywhere from the Hub."""
    return f"""## Use

```python
import timm
from PIL import Image
model = timm.create_model("{address}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
shares = model(transform(Image.open("photo.jpg").convert("RGB"))[None]).softmax(1)[0]
print(model.pretrained_cfg["label_names"][int(shares.argmax())], shares.max().item())
```"""


def programs(card: Card) -> str:
    cfg, side = card.cfg, card.cfg.img_size
    taken = (
        f"normalised with mean {list(cfg.mean)} and standard deviation {list(cfg.std)}"
        if card.normalized
        else "from 0 to 1; they normalise them"
    )
    listed = " and ".join(f"`{name}` (within {gap:.0e} of PyTorch)" for name, gap in card.gaps.items())
    return (
        f"As programs: {listed}. They take `images`, float32 [N, 3, {side}, {side}], RGB {taken}, and give `logits`, "
        f"float32 [N, {len(cfg.classes)}], in the order of `label_names` in `config.json`."
    )


def curve(folder: Path, run: Path) -> str:
    """The accuracy of every epoch as the run drew it; "" where it has not."""
    drawn = run / "plots" / "accuracy_live.png"
    if not drawn.is_file():
        return ""
    shutil.copyfile(drawn, folder / "accuracy.png")
    return "![Accuracy by epoch](accuracy.png)"


def per_class(folder: Path, card: Card) -> str:
    """What `evaluate` found: its first lines, the table of classes, and the confusion matrix.

    UserError: its folder is not there, or about a model of other classes.
    """
    try:
        # Names stay what they are, also "000" and "NA".
        names = {"dtype": {"class": str}, "keep_default_na": False, "na_values": [""]}
        table = pd.read_csv(card.evaluation / "per_class.csv", **names)
        head = (card.evaluation / "report.txt").read_text().split("\n\ncalibration")[0]
        shutil.copyfile(card.evaluation / "confusion.png", folder / "confusion.png")
    except OSError as error:
        why = f"{error.strerror}: {error.filename}"
        raise UserError(
            f"--evaluation {card.evaluation} is not a folder that evaluate wrote ({why})"
        ) from error
    if (
        table["class"].tolist() != card.cfg.classes
        or f"weights {card.weights}," not in head.partition("\n")[0]
    ):
        raise UserError(
            f"--evaluation {card.evaluation} is about other weights; make one of these with evaluate"
        )
    shown = (
        "Every class"
        if len(table) <= MOST_CLASSES
        else f"The {MOST_CLASSES} worst of {len(table)} classes by F1"
    )
    table = table.sort_values("f1", kind="stable").head(MOST_CLASSES)
    for share in ("precision", "recall", "f1"):
        table[share] = table[share].map("{:.1%}".format, na_action="ignore").fillna("–")
    table.columns = ["class", "precision", "recall", "F1", "images"]
    # Without the first line, whose paths are this machine's.
    figures = head.partition("\n\n")[2]
    return f"## Evaluation\n\n```\n{figures}\n```\n\n{shown}:\n\n{markdown(table)}\n\n![Confusion](confusion.png)"


def markdown(table: pd.DataFrame) -> str:
    cells = [table.columns, ["---"] * len(table.columns), *table.astype(str).to_numpy()]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)


def data_section(cfg: PretrainedCfg, record: Mapping[str, Any], dataset: str) -> str:
    images = (
        f"{dataset}: {record['progress']['num_images']:,} training images. " if record else "Not recorded. "
    )
    names = ", ".join(cfg.classes[:100]) + (", ..." if len(cfg.classes) > 100 else "")
    return f"## Data\n\n{images}{len(cfg.classes)} classes: {names}."


def training(folder: Path, run: Path, record: Mapping[str, Any]) -> str:
    """Command, stages, machine and time."""
    progress, summary = record["progress"], record["summary"]
    stages = pd.DataFrame(record["config"]["stages_in_force"])
    stages["data_fraction"] = stages["data_fraction"].map("{:.0%}".format)
    stages["frozen"] = stages["frozen"].map(" ".join)
    table = stages[["epochs", "img_size", "batch_size", "data_fraction", "shape", "frozen"]]
    table.columns = ["epochs", "px", "batch per process", "share of the data", "shape", "frozen"]
    return (
        f"## Training\n\n```bash\n{command(folder, run, record['config']['strategy'])}\n```\n\n{markdown(table)}\n\n"
        f"Peak learning rate {progress['peak_lr']:.4g}; {progress['images_seen']:,} images seen in "
        f"{clock(progress['wall_s'])} (h:min:s or min:s) on {summary.get('hardware', 'a machine that was not recorded')}."
    )


def command(folder: Path, run: Path, strategy: str) -> str:
    """The command that trains the same stages again, with the run's settings in training.yaml; places by name alone."""
    settings = yaml.safe_load((run / "config.yaml").read_text())
    words = ["python", f"train_{strategy}.py", "--config", "training.yaml"]
    for name in ("data_dir", "weights"):
        if place := settings.pop(name, ""):
            words += [f"--{name}", public_name(place)]
    # What changes nothing but where a run lives and how fast it is.
    for name in RESUME_MAY_CHANGE - {"patience"}:
        settings.pop(name, None)
    (folder / "training.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return shlex.join(words)
