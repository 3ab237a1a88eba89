"""Defaults that fit the data, the budget and the machine.

The strategies' lists are written for ImageNet (1.28 million images, 1,000 classes), 50 to 90 epochs and 4 or 8 processes; there every rule
here leaves them as they are. Elsewhere a rule changes what its reason does not bear, and a note says so and names the flag. What the user
set is never changed. Reasons are published or measured; docs/recipe.md has the figures, also those that speak against a rule.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, groupby, repeat
from typing import Any

from common.scheduling.rates import is_sgd, known_peak
from common.scheduling.stages import (
    BACKBONE,
    PATCH,
    STATISTICS,
    Stage,
    apportion,
    in_patches,
)

# Levels of regularisation, and the epochs from which each holds. Mixing cost 9 points in 5 and in 12 epochs; ffcv-imagenet (16 to 88
# epochs) and Mosaic ResNet (below 67) do without it, Mosaic's longer recipes and our lists, from 50 epochs, have it.
LEVELS = ("mild", "medium", "strong")
MEDIUM_FROM, STRONG_FROM = 25, 50
# With fewer images seen of a class, one level milder: blended labels teach little about a class that is hardly known. Reasoned only;
# ImageNet's classes are seen 64,000 times in 50 epochs.
SEEN_PER_CLASS = 10_000
# Smallest crop as a share of the image: 35 % won 7.7 points over 8 % in 5 epochs; medium is the geometric mean of the two.
SMALLEST_CROP = {"mild": 0.35, "medium": 0.17, "strong": 0.0}
# Share of the listed mixing and erasing that is left.
KEPT = {"mild": 0.0, "medium": 0.5, "strong": 1.0}
# Optimizer steps that an epoch has at least, also where it takes more of the data.
STEPS_PER_EPOCH = 20
# Those that batches leave an epoch and a run. Below a problem's critical batch a smaller one costs no epochs (Shallue et al., 2019), and 500
# steps are short on any machine: batch 32 with 1,140 was no better than batch 64 with 564. In a long run they allow batches that are too
# large: in 40 epochs one of 256 ended 2.8 points below 64. No stage of the lists has fewer than 39 an epoch at its own scale.
STEPS_BY_BATCH, STEPS_PER_RUN = 39, 500
# Where time is what is short, a run's steps are not bought with smaller batches than this one: on a CPU 32 images of 32 px take 1.6 times as
# long as 8, and in equal time ended 14 points higher.
WORTHWHILE_BATCH = 32
# BatchNorm's statistics of 8 images per process cost a point of accuracy on ImageNet, of 4 four points (Wu and He, 2018, Group
# Normalization).
FEWEST_IMAGES = 8
# Pixels per cell of the last map (the stride) of most networks, and the smallest training image.
DEFAULT_STRIDE, SMALLEST_SIZE = 32, 32
# Sizes of a short run's curriculum, at most: EfficientNetV2-S takes four (Tan and Le, 2021). And the smallest one's share of the largest, a
# ninth of the pixels. When the size doubles, top-1 falls by 10 points, and is back two of twelve epochs later.
SIZES, SMALLEST_SHARE = 4, 1 / 3
# OneCycle's (Smith and Topin, 2018), and the swing of torch's.
RISE, SWING = 0.3, 0.05
# Share of a short run's epochs that rectangles settle in, after squares, and the strength of crops and erasing there.
SETTLING_SHARE, SETTLING_STRENGTH = 0.25, 0.2
# The finder's sweep is at most this share of the run, but no fewer steps than tell six decades of rates apart.
FINDER_SHARE, FINDER_STEPS = 0.1, 25
# EMA's horizon as a share of the run: 4 % in torchvision's recipe, which scales it with the epochs, below 1 % in Mosaic's; 22 % lost 1.9 points.
EMA_SHARE = 0.04


@dataclass(frozen=True)
class Facts:
    """What the rules know about the training images and the machine.

    short_side: median of the originals, in pixels. stride: pixels per cell of the network's last feature map. 0 = unknown.
    linear_head: the network ends in one linear layer, which can be fitted to what enters it.
    batch_spoils: trained features are worth much less where BatchNorm normalises by the batch.
    """

    images: int
    classes: int
    processes: int = 1
    short_side: int = 0
    stride: int = 0
    linear_head: bool = False
    batch_spoils: bool = False


@dataclass(frozen=True)
class Recipe:
    """All of the run's stages, the settings that change by name, and a sentence for each change that names its flag."""

    stages: list[Stage]
    values: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def fitting_level(stages: Sequence[Stage], facts: Facts) -> str:
    """How strongly a run of this length over this data is regularised."""
    epochs = sum(stage.epochs for stage in stages)
    rank = (epochs >= MEDIUM_FROM) + (epochs >= STRONG_FROM)
    hardly_known = facts.images * epochs < SEEN_PER_CLASS * facts.classes
    return LEVELS[max(0, rank - hardly_known)]


def is_short(stages: Sequence[Stage]) -> bool:
    """Whether a run is shorter than those the lists are written for."""
    return sum(stage.epochs for stage in stages) < STRONG_FROM


def adapt(
    stages: Sequence[Stage],
    settings: Mapping[str, Any],
    given: Collection[str],
    facts: Facts,
) -> Recipe:
    """The stages and settings for this data and machine; at the lists' own scale, those of the lists.

    Args:
        stages: the strategy's list, scaled to --epochs, --img_size and --batch_size.
        settings: all of the script's settings by name.
        given: names of the settings that the user set; "stages" among them means that the list is the user's, and it stays whole.
        facts: about data and machine.
    """
    result = Recipe(list(stages))
    # The level of regularisation: auto = by the run's length; listed = change nothing at all.
    recipe = settings["recipe"]
    if recipe == "listed":
        return result
    length, free = fitting_level(stages, facts), settings.keys() - set(given)
    if "stages" not in given:
        short = is_short(stages)
        if short:
            _fit_shapes(result, free)
            _fit_head(result, free, facts)
            _fit_statistics(result, facts)
        _fit_sizes(result, settings, free, facts, short)
        _fit_batches(result, settings, free, facts)
    smaller = [s.batch_size for s in result.stages] != [s.batch_size for s in stages]
    shorter = length != "strong" or smaller
    # A list's own rate is SGD's.
    if shorter or not is_sgd(settings["optimizer"]):
        _fit_peak(result, settings, free)
    if shorter:
        _fit_rates(result, settings, free)
    _fit_regularisation(result, settings, free, length if recipe == "auto" else recipe)
    _fit_horizons(result, settings, free, facts)
    if "stages" not in given and short:
        # Neighbours that came out alike are one stage.
        alike = groupby(result.stages, lambda stage: replace(stage, epochs=1))
        result.stages[:] = [replace(stage, epochs=sum(s.epochs for s in group)) for stage, group in alike]
    return result


def smallest_size(stride: int) -> int:
    """Below it the last map is a single cell, so that of its 3 x 3 kernels the middle alone would learn."""
    return max(SMALLEST_SIZE, (stride // PATCH + 1) * PATCH)


def _fit_shapes(recipe: Recipe, free: set[str]) -> None:
    """Squares first, rectangles of as many pixels and nearly whole images last, where a short run has rectangles only."""
    stages = recipe.stages
    if any(stage.shape == "square" or stage.epochs < 3 for stage in stages):
        return
    settling = [max(1, round(SETTLING_SHARE * stage.epochs)) for stage in stages]
    squares = [replace(s, epochs=s.epochs - n, shape="square") for s, n in zip(stages, settling, strict=True)]
    # Evaluation shows whole images, so the network settles on such (FixRes, Touvron et al., 2019): 4 points over crops from 35 %.
    settle = [
        replace(s, epochs=n, strength=SETTLING_STRENGTH * s.strength)
        for s, n in zip(stages, settling, strict=True)
    ]
    stages[:] = [*squares, *settle]
    recipe.notes.append(f"squares for {sum(s.epochs for s in squares)} epochs, then rectangles (--stages)")
    if "rect_area" in free:
        recipe.values["rect_area"] = "constant"
        recipe.notes.append("rectangles of as many pixels as the square (--rect_area)")


def _fit_head(recipe: Recipe, free: set[str], facts: Facts) -> None:
    """No epochs for the head alone where it can be fitted to the features of the weights, in one pass, before the first step."""
    stages = recipe.stages
    if not facts.linear_head or "head_epochs" not in free:
        return
    # A regression ends where those epochs lead, and the finder sees the layers that will train (LP-FT: Kumar et al., 2022).
    rest = [stage for stage in stages if BACKBONE not in stage.frozen]
    if not rest or len(rest) == len(stages):
        return
    epochs = sum(stage.epochs for stage in stages)
    spared = epochs - sum(stage.epochs for stage in rest)
    stages[:] = [replace(rest[0], epochs=rest[0].epochs + spared, lr_scale=None), *rest[1:]]
    recipe.notes.append(
        f"the head is fitted to the weights' features, and {epochs} epochs train all layers (--head_epochs)"
    )


def _fit_statistics(recipe: Recipe, facts: Facts) -> None:
    """BatchNorm keeps the statistics of trained weights in a short run, where their features need them."""
    # In a long one there is time to learn anew. Keras's guide to fine-tuning EfficientNets keeps them too. EfficientNet-Lite0's gained 2 points
    # on Caltech-101; on photographs of clothes 3 on validation images, and none on test images.
    if facts.batch_spoils:
        recipe.stages[:] = [replace(s, frozen=(*s.frozen, STATISTICS)) for s in recipe.stages]
        recipe.notes.append("BatchNorm keeps the weights' statistics (--stages)")


def _fit_sizes(
    recipe: Recipe, settings: Mapping[str, Any], free: set[str], facts: Facts, short: bool
) -> None:
    """No stage larger than the images, unless the user says so, and none smaller than the network bears."""
    stride = facts.stride or DEFAULT_STRIDE
    sizes = [stage.img_size for stage in recipe.stages]
    largest = top = max(sizes)
    flag = "target_size" if "target_size" in settings else "img_size"
    # Enlarged pixels hold nothing new; but a map of one cell has no inside, so two are left. Pretrained features expect objects as large
    # as they learnt them, on enlarged images too (Kornblith et al., 2019, fine-tune CIFAR at 224 px).
    if facts.short_side and flag in free and not settings.get("weights"):
        top = min(largest, max(facts.short_side // stride * stride, 2 * stride, SMALLEST_SIZE))
    if top < largest:
        sizes = [top if size == largest else in_patches(size * top / largest) for size in sizes]
        recipe.notes.append(f"{top} px, not {largest}: the images have {facts.short_side} (--{flag})")
    floor, different = min(smallest_size(stride), top), sorted(set(sizes))
    if floor > different[0] and len(different) > 1 and not short:
        step = (top - floor) / (len(different) - 1)
        spaced = [floor + step * different.index(size) for size in sizes]
        sizes = [top if size == top else in_patches(size) for size in spaced]
        recipe.notes.append(f"stages of {sizes} px: the network needs {floor} (--stages)")
    recipe.stages[:] = [replace(s, img_size=size) for s, size in zip(recipe.stages, sizes, strict=True)]
    if short:
        _fit_curriculum(recipe, floor)


def _fit_curriculum(recipe: Recipe, floor: int) -> None:
    """All of the data in every epoch, and as many epochs for each size; sizes rise in equal steps. All else stays with its epochs."""
    # Small stages are cheap, so that leaving data out of them saves little; and it takes steps, which a smaller batch has to give back:
    # with its shares a curriculum ended at 66.9 %, at the same cost without at 70.4.
    if any(stage.data_fraction < 1 for stage in recipe.stages):
        recipe.stages[:] = [replace(stage, data_fraction=1.0) for stage in recipe.stages]
        recipe.notes.append("all of the data in every stage (--stages)")
    batches = {stage.img_size: stage.batch_size for stage in recipe.stages}
    if len(batches) == 1:
        return
    epochs = [replace(stage, epochs=1) for stage in recipe.stages for _ in range(stage.epochs)]
    top = max(batches)
    span = top - max(floor, SMALLEST_SHARE * top)
    number = min(SIZES, len(epochs)) if span > 0 else 1
    spaced = [top - span * step / (number - 1) for step in range(1, number)]
    sizes = sorted({top, *(min(top, in_patches(size)) for size in spaced)})
    lengths = apportion([1] * len(sizes), len(epochs))
    for i, size in enumerate(chain.from_iterable(map(repeat, sizes, lengths))):
        # Memory that the next larger of the listed sizes needs is enough.
        batch = batches[min(listed for listed in batches if listed >= size)]
        epochs[i] = replace(epochs[i], img_size=size, batch_size=batch)
    recipe.stages[:] = epochs
    plan = ", ".join(f"{length} at {size} px" for length, size in zip(lengths, sizes, strict=True))
    recipe.notes.append(f"as many epochs for each size, in equal steps: {plan} (--stages)")


def _fit_batches(recipe: Recipe, settings: Mapping[str, Any], free: set[str], facts: Facts) -> None:
    """Batches, in powers of two, that leave every epoch and the run enough steps; no stage goes below --batch_size.

    Where the smallest batch leaves a share of the images too few steps, the share grows.
    """
    world = facts.processes * settings["accumulation"]
    seen = facts.images * sum(stage.epochs * stage.data_fraction for stage in recipe.stages)
    worthwhile = WORTHWHILE_BATCH if settings["budget"] else 0
    listed = [stage.batch_size for stage in recipe.stages]
    listed_shares = [stage.data_fraction for stage in recipe.stages]
    least = FEWEST_IMAGES if "batch_size" in free else max(recipe.stages, key=lambda s: s.img_size).batch_size
    for i, stage in enumerate(recipe.stages):
        images = facts.images * stage.data_fraction
        bought = max(worthwhile, min(images / STEPS_BY_BATCH, seen / STEPS_PER_RUN))
        room = min(images / STEPS_PER_EPOCH, bought) / world
        fitting = max(least, 2 ** math.floor(math.log2(max(1, room))))
        batch = min(stage.batch_size, fitting)
        needed = min(1.0, STEPS_PER_EPOCH * batch * world / facts.images)
        recipe.stages[i] = replace(stage, batch_size=batch, data_fraction=max(stage.data_fraction, needed))
    batches = [stage.batch_size for stage in recipe.stages]
    if batches != listed:
        fitted, before = (", ".join(map(str, dict.fromkeys(sizes))) for sizes in (batches, listed))
        recipe.notes.append(f"batches of {fitted}, not {before}, for more steps (--batch_size)")
    shares = [stage.data_fraction for stage in recipe.stages]
    if shares != listed_shares:
        percent = ", ".join(f"{share:.0%}" for share in shares)
        recipe.notes.append(f"{percent} of the data by stage, for more steps (--stages)")


def _fit_peak(recipe: Recipe, settings: Mapping[str, Any], free: set[str]) -> None:
    """The peak of the learning rate, where length, batches or optimizer are no longer the list's."""
    # The linear rule is known from 256 images up (Goyal et al., 2017); at 64 it gives 0.025, and 0.14 to 0.32 do well.
    # The limit belongs to the rule.
    if settings["lr"] != "auto":
        if "lr" not in free:
            return
        recipe.values["lr"] = "auto"
        kind = "a peak found here" if is_sgd(settings["optimizer"]) else f"{settings['optimizer']}'s own peak"
        recipe.notes.append(f"{kind} (--lr auto), not {settings['lr']} per 256 images")
    if "max_lr" in free and settings["max_lr"] is not None:
        recipe.values["max_lr"] = None
        recipe.notes.append("no limit for the peak (--max_lr)")
    # Which is above the rate of the blow-up, and borne only after a warm-up at less momentum.
    cycle = {"pct_start": RISE}
    if SWING <= settings["momentum"] < 1 - SWING:
        cycle["momentum_swing"] = SWING
    if changes := {name: value for name, value in cycle.items() if name in free and settings[name] < value}:
        recipe.values.update(changes)
        named = ", ".join(f"--{name} {value}" for name, value in changes.items())
        recipe.notes.append(f"OneCycle's warm-up and momentum ({named})")


def _fit_rates(recipe: Recipe, settings: Mapping[str, Any], free: set[str]) -> None:
    """The curve of the learning rate over the stages, where length or batches are no longer the list's."""
    # A new head has a cycle of its own; other stages spend too much of a short run on warming up: 3.0 points against one cycle. And the
    # last size needs a rate that still moves: listed scales anneal on top of the cycle.
    if any(BACKBONE in stage.frozen for stage in recipe.stages):
        return
    if "stage_wise" in free and settings["stage_wise"] and len(recipe.stages) > 1:
        recipe.values["stage_wise"] = False
        recipe.notes.append("one OneCycle, not one per stage (--stage_wise)")
    if "stages" in free and any(stage.lr_scale for stage in recipe.stages):
        recipe.stages[:] = [replace(stage, lr_scale=None) for stage in recipe.stages]
        recipe.notes.append("peaks follow the batches, without the listed scales (--stages)")


def _fit_regularisation(recipe: Recipe, settings: Mapping[str, Any], free: set[str], level: str) -> None:
    """Crops, mixing and erasing by level; gentler on small images."""
    if level == "strong":
        return
    kept, smallest, said = KEPT[level], SMALLEST_CROP[level], []
    low, high = settings["crop_scale"]
    if "crop_scale" in free and low < smallest <= high:
        recipe.values["crop_scale"] = (smallest, high)
        said.append(f"crops of {smallest:.0%} to {high:.0%} (--crop_scale)")
    # 0.875 is the custom with crops from 8 %. Those from 35 % have shown the edges too: whole squares gave 0.6, 2.4 and 5.6 points.
    gentle = recipe.values.get("crop_scale", settings["crop_scale"])[0] >= SMALLEST_CROP["mild"]
    if "crop_pct" in free and gentle and settings["crop_pct"] < 1:
        recipe.values["crop_pct"] = 1.0
        said.append("whole squares in evaluation (--crop_pct)")
    mixing = {"stages", "mixup_share", "mixup_alpha", "cutmix_alpha", "batch_aug_prob"} & settings.keys()
    # Who leaves one of the two out has not asked for the other.
    asked = any(settings[name] for name in mixing - free)
    if not asked and any(stage.mixup for stage in recipe.stages):
        recipe.stages[:] = [replace(stage, mixup=kept * stage.mixup) for stage in recipe.stages]
        said.append(f"mixing in {kept:.0%} of the listed epochs (--mixup_alpha)")
    if "erasing_prob" in free and settings["erasing_prob"]:
        recipe.values["erasing_prob"] = kept * settings["erasing_prob"]
        said.append(f"erasing in {recipe.values['erasing_prob']:.0%} (--erasing_prob)")
    # 4.8 points in 19 epochs; the idea is EfficientNetV2's (Tan and Le, 2021).
    sizes = {stage.img_size for stage in recipe.stages}
    if "stages" in free and len(sizes) > 1:
        recipe.stages[:] = [replace(s, strength=s.strength * s.img_size / max(sizes)) for s in recipe.stages]
        said.append("gentler on small images (--stages)")
    epochs = sum(stage.epochs for stage in recipe.stages)
    if said:
        recipe.notes.append(f"{epochs} epochs, {level} regularisation (--recipe): {', '.join(said)}")


def _fit_horizons(recipe: Recipe, settings: Mapping[str, Any], free: set[str], facts: Facts) -> None:
    """What is counted in steps follows the run's: EMA's memory, if it is longer than the run, and the finder's sweep."""
    steps = 0
    for stage in recipe.stages:
        batch = stage.batch_size * facts.processes * settings["accumulation"]
        steps += stage.epochs * max(1, int(facts.images * stage.data_fraction) // batch)
    if settings["ema"] and "ema_decay" in free and steps * (1 - settings["ema_decay"]) < 1:
        recipe.values["ema_decay"] = 1 - 1 / max(1.0, EMA_SHARE * steps)
        recipe.notes.append(f"EMA decay {recipe.values['ema_decay']:.4g}: {steps:,} steps (--ema_decay)")
    sweep = max(FINDER_STEPS, int(FINDER_SHARE * steps))
    swept = known_peak({**settings, **recipe.values}, 1) is None
    if swept and "lr_finder_iterations" in free and sweep < settings["lr_finder_iterations"]:
        recipe.values["lr_finder_iterations"] = sweep
        recipe.notes.append(f"a sweep of {sweep} of {steps:,} steps (--lr_finder_iterations)")
