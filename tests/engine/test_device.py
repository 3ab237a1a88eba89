"""What a GPU would show, tested without one: between two looks nothing waits for the device, and results stay there."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.augment import Augment, AugmentSettings
from common.data.loader import Batch
from common.engine.evaluate import evaluate
from common.engine.fit import train_epoch
from common.engine.trainer import Trainer
from common.run.progress import Meter
from common.scheduling import Stage
from tests.engine.trainers import CLASSES, Small, alone, noise, rates_of, small_trainer

STAGE = Stage(epochs=1, img_size=16, batch_size=4)
EXTRAS = {"ema": True, "clip_grad": 1.0, "accumulation": 2}
AUGMENTATION = {"mixup_alpha": 0.2, "cutmix_alpha": 1.0, "erasing_prob": 0.5, "cutout_prob": 0.5}
# Operations whose result the host must know: its value, or its shape.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_consecutive")


class Watch(TorchDispatchMode):
    """Counts what makes the host wait for the device, and what moves between the two, by name.

    On the CPU, which is host and device at once, only the first can be seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        masks = name in ("index", "index_put_") and any(
            t.dtype in (torch.bool, torch.uint8) for t in tensors[1:]
        )
        if name in WAITING or masks:
            self.calls[name] += 1
        came = {t.device.type for t in tensors if t.ndim}
        went = {leaf.device.type for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        if name in ("_to_copy", "copy_") and came | went == {"cpu", "meta"}:
            self.calls["to the device" if "meta" in went else "to the host"] += 1
        return result


def counted(t: Trainer, steps: int) -> Counter[str]:
    """Calls that wait or move data, over a few optimizer steps as the loop takes them between two looks."""
    epoch = next(t.plan.epochs())
    t.enter_stage(epoch)
    t.begin_epoch(epoch)
    stream, rates = iter(list(noise(t, epoch))), rates_of(t)
    # The first steps make what lasts: momentum, tables of constants.
    for watch in (Watch(), watched := Watch()):
        with watch:
            for _ in range(steps):
                step = t.state.progress.step
                t.train_step(epoch, rates.lr(step), rates.momentum(step), stream)
                t.state.progress.step += 1
                t.meter.tick()
    return watched.calls


# --- whole steps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_no_step_waits(precision):
    with small_trainer([STAGE], mixed_precision=precision, **EXTRAS) as t:
        assert counted(t, 4) == Counter()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_no_step_waits_for_gradient_scaling(accumulation):
    """torch's scaler asks whether the gradients overflowed, except of an optimizer that is fused."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    with small_trainer([STAGE], scaler=scaler, ema=True, accumulation=accumulation) as t:
        assert counted(t, 4) == Counter()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_sends_one_table_of_draws_and_fetches_nothing(optimizer):
    """On the meta device no number can be read at all: `item` and `tolist` raise."""
    # timm's average takes no meta device; that it waits for nothing is seen above.
    settings = EXTRAS | AUGMENTATION | {"optimizer": optimizer, "ema": False}
    with small_trainer([STAGE], images=128, device="meta", **settings) as t:
        for group in t.state.optimizer.param_groups:
            # Whose kernel needs a real device; the tests above run it.
            group["fused"] = False
        calls = counted(t, 6)
        assert calls.pop("to the device") == 6 * 2
        # AdamW's step numbers lie on the host.
        calls.pop("_local_scalar_dense", None)
        assert calls == Counter()
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            t.look()


def test_adamws_counters_stay_on_the_host_when_a_run_goes_on():
    """Read on the device they would be waited for, for each parameter and step."""
    with small_trainer([STAGE], device="meta", optimizer="adamw") as t:
        counted(t, 2)
        Trainer(t.run, t.state, t.plan, t.batches, None)
        assert {state["step"].device.type for state in t.state.optimizer.state.values()} == {"cpu"}


def test_the_watch_sees_what_waits():
    values = torch.arange(4.0)
    for wait in (
        lambda: values.sum().item(),
        lambda: float(values[0]),
        lambda: values[values > 1],
        lambda: bool((values > 1).any()),
        lambda: torch.masked_select(values, values > 1),
        lambda: values.to("meta"),
        lambda: torch.empty(4, device="meta").copy_(values),
    ):
        with Watch() as watch:
            wait()
        assert watch.calls, wait


def test_an_epoch_looks_at_its_pace(monkeypatch):
    """Not after each step; so the device is waited for once a second, and not for each batch."""
    looks = []
    original = Trainer.look

    def look(self):
        looks.append(self.state.progress.step)
        return original(self)

    monkeypatch.setattr(Trainer, "look", look)
    monkeypatch.setattr("common.run.run.MOST_STEPS_UNSEEN", 8)
    monkeypatch.setattr("common.run.run.LOOK_S", 1e9)
    with small_trainer([STAGE], images=4 * 40) as t:
        epoch = next(t.plan.epochs())
        t.enter_stage(epoch)
        train_epoch(t, epoch, rates_of(t), noise(t, epoch))
    # After the first step, then every 8, and at the epoch's end.
    assert looks == [1, 9, 17, 25, 33, 40]


# --- on a GPU that is not there ------------------------------------------------------------------------------------


class Placed(TorchDispatchMode):
    """Notes operations whose result lies on the host although what they worked on lay on the device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.left: list[str] = []
        self.on_device = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        came = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        went = {leaf.device.type for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        self.on_device += self.device in went
        if self.device in came and "cpu" in went:
            self.left.append(str(func))
        return result


def accelerator_on(device, monkeypatch):
    """An accelerator that believes it has that device."""
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(PartialState(), "device", torch.device(device))
    monkeypatch.setattr(accelerator.state, "device", torch.device(device))
    return accelerator


def images_on(device):
    images = torch.empty(4, 3, 16, 16, dtype=torch.uint8, device=device)
    return images, torch.empty(4, dtype=torch.int64, device=device)


def test_forward_and_meter_stay_on_the_device(monkeypatch):
    run = SimpleNamespace(accelerator=accelerator_on("cuda", monkeypatch), is_main=False)
    epoch = SimpleNamespace(index=0, steps=4, first_step=0)
    progress = SimpleNamespace(step=0, epoch_sums=[0.0, 0.0])
    with FakeTensorMode(), Placed("cuda") as placed:
        augment = Augment(AugmentSettings(), num_classes=CLASSES, seed=0)
        not_finite = torch.zeros((), dtype=torch.int64, device="cuda")
        meter = Meter(run, SimpleNamespace(total_epochs=1), epoch, progress, not_finite)
        images, labels = images_on("cuda")
        with torch.device("cuda"):
            model = Small()
        # A fake backward pass would ask the driver.
        with torch.no_grad():
            logits = model(augment.normalise(images))
        targets = nn.functional.one_hot(labels, CLASSES).float()
        meter.add(nn.functional.cross_entropy(logits, targets), logits, targets, 0.0)
        meter.tick()
        for tensor in (logits, meter.sums, meter.not_finite, meter.skipped):
            assert tensor.device.type == "cuda"
    assert placed.left == []
    assert placed.on_device > 20


def test_evaluation_sums_on_the_device_until_all_images_are_seen(monkeypatch):
    accelerator = accelerator_on("meta", monkeypatch)
    augment = Augment(AugmentSettings(), num_classes=CLASSES, seed=0)
    reduced = []

    def reduce(tensor, how):
        reduced.append(tensor)
        return np.full(tensor.shape, 12 // CLASSES)

    monkeypatch.setattr(accelerator, "reduce", reduce)
    with torch.device("meta"):
        models = [Small(), Small()]
    batches = (Batch(*images_on("meta"), None, 0.0) for _ in range(3))
    with Placed("meta") as placed:
        evaluate(alone(accelerator), models, batches, 3, 12, augment)
    assert [tensor.device.type for tensor in reduced] == ["meta", "meta"]
    assert placed.left == []
    assert placed.on_device > 60
