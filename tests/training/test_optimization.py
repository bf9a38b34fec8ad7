"""Optimizer, schedules and averages against their formulas."""

import math
import warnings

import lightning
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

from detector.training.failures import TrainingError
from detector.training.optimization import OptimizerConfig, WeightEMA, make_optimizer, make_schedule

NAMES = ["adamw", "sgd"]


@pytest.mark.parametrize(
    ("rule", "rates"),
    [
        ("linear", {1: 0.0125, 4: 0.05, 16: 0.2, 64: 0.8, 100: 1.25}),
        ("sqrt", {1: 0.05, 4: 0.1, 16: 0.2, 64: 0.4, 100: 0.5}),
        ("constant", {1: 0.2, 4: 0.2, 16: 0.2, 64: 0.2, 100: 0.2}),
    ],
)
def test_the_peak_rate_follows_the_images_of_a_step(rule, rates):
    settings = OptimizerConfig(lr=0.2, lr_batch=16, lr_rule=rule)
    assert {images: settings.rate(images) for images in rates} == pytest.approx(rates, rel=1e-12)


class SmallDetector(nn.Module):
    """Layers with and without decay, a frozen stem, and a layer used twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).requires_grad_(False)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.GroupNorm(2, 4), nn.BatchNorm2d(4, affine=False))
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.head = self.again = nn.Linear(4, 5)
        self.scale = nn.Parameter(torch.tensor(2.0))


DECAYING = {"body.0.weight", "up.weight", "head.weight"}
STEADY = {"body.0.bias", "body.1.weight", "body.1.bias", "up.bias", "head.bias", "scale"}


@pytest.mark.parametrize("name", NAMES)
def test_weights_decay_and_norms_and_biases_do_not(name):
    model = SmallDetector()
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = make_optimizer(model, OptimizerConfig(name=name, weight_decay=0.05), 1).param_groups
    decays = [(names[p], group["weight_decay"]) for group in groups for p in group["params"]]
    assert len(decays) == len(DECAYING | STEADY)  # each exactly once
    assert dict(decays) == dict.fromkeys(DECAYING, 0.05) | dict.fromkeys(STEADY, 0.0)
    (group,) = make_optimizer(nn.LayerNorm(3), OptimizerConfig(name=name), 0.1).param_groups  # no empty one
    assert group["weight_decay"] == 0


def test_the_optimizers():
    sgd = make_optimizer(nn.Linear(2, 2), OptimizerConfig(name="sgd", momentum=0.7), 0.1)
    adamw = make_optimizer(nn.Linear(2, 2), OptimizerConfig(), 0.1)
    assert (type(sgd), sgd.defaults["lr"], sgd.defaults["momentum"]) == (torch.optim.SGD, 0.1, 0.7)
    assert (type(adamw), adamw.defaults["lr"], adamw.defaults["betas"]) == (torch.optim.AdamW, 0.1, (0.9, 0.999))


def course(config, steps, epochs, peak=0.4, name="adamw", reload_at=None):
    """The rate of each step, as a run has it: the optimizer's, in every group."""

    def fresh():
        optimizer = make_optimizer(nn.Linear(2, 2), OptimizerConfig(name=name), peak)
        return optimizer, make_schedule(optimizer, config, steps, epochs)

    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer, schedule = fresh()
        for step in range(steps):
            if step == reload_at:
                before, (optimizer, schedule) = (optimizer, schedule), fresh()
                optimizer.load_state_dict(before[0].state_dict())
                schedule.load_state_dict(before[1].state_dict())
            (rate,) = {group["lr"] for group in optimizer.param_groups}
            rates.append(rate)
            optimizer.step()
            schedule.step()
    return rates


def anneal(start, end, share):
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def expected_rate(config, step, steps, epochs, peak):
    if config.schedule == "onecycle":  # Smith and Topin 2018, as PyTorch has it: 30 % up from a 25th, then down
        top, end = 0.3 * steps - 1, steps - 1
        if step <= top:
            return anneal(peak / 25, peak, step / top)
        return anneal(peak, peak / 25 / 1e4, (step - top) / (end - top))
    warmup = min(config.warmup_steps, steps // 2)
    if step < warmup:
        return peak * (0.001 + 0.999 * step / warmup)
    if config.schedule == "cosine":
        return anneal(peak, 0, (step - warmup) / (steps - warmup))
    drops = sum(step >= max(round(epoch * steps / epochs), warmup + 1) for epoch in config.milestones)
    return peak / 10**drops


CONFIGS = st.builds(
    OptimizerConfig,
    schedule=st.sampled_from(["onecycle", "cosine", "multistep"]),
    warmup_steps=st.integers(0, 250),
    milestones=st.lists(st.integers(0, 30), max_size=3, unique=True).map(sorted).map(tuple),
)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    config=CONFIGS,
    steps=st.integers(1, 200),
    epochs=st.integers(1, 30),
    peak=st.sampled_from([1e-4, 0.02, 3.0]),
    name=st.sampled_from(NAMES),
)
@example(OptimizerConfig(schedule="onecycle"), 1, 1, 0.4, "sgd")
@example(OptimizerConfig(schedule="cosine"), 1, 1, 0.4, "sgd")
@example(OptimizerConfig(schedule="multistep"), 1, 12, 0.4, "sgd")
@example(OptimizerConfig(schedule="multistep"), 7, 12, 0.4, "adamw")
def test_every_step_of_every_schedule_by_hand(config, steps, epochs, peak, name):
    rates = course(config, steps, epochs, peak, name)
    assert all(0 < rate <= peak * (1 + 1e-6) for rate in rates)
    expected = [expected_rate(config, step, steps, epochs, peak) for step in range(steps)]
    assert rates == pytest.approx(expected, rel=1e-6, abs=1e-9 * peak)


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "multistep"])
@pytest.mark.parametrize("stop", [5, 11, 60])
def test_a_schedule_goes_on_from_its_state(schedule, stop):
    config = OptimizerConfig(schedule=schedule, warmup_steps=10, milestones=(4, 7))
    assert course(config, 100, 10, reload_at=stop) == pytest.approx(course(config, 100, 10), rel=1e-12)


def averages(values, decay):
    """In float64: the first value, then moves by 1 - min(decay, (1 + n) / (10 + n)) after n steps."""
    average, found = values[0], [values[0]]
    for number, value in enumerate(values[1:], start=1):
        share = min(decay, (1 + number) / (10 + number))
        average = share * average + (1 - share) * value
        found.append(average)
    return found


class Walk(lightning.LightningModule):
    """A weight that takes steps of 1, 2, 3 and so on."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.frozen = nn.Parameter(torch.tensor([0.1]), requires_grad=False)
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("mean", torch.tensor(0.0))
        self.walked, self.scored = [], []

    def training_step(self, batch, batch_idx):
        self.count += 1
        self.mean.fill_(10.0 * self.count)
        return -(self.weight * self.count).sum()

    def on_train_batch_end(self, *args):
        self.walked.append(self.weight.item())

    def validation_step(self, batch, batch_idx):
        self.scored.append(self.weight.item())

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], 1.0)


def test_lightning_scores_and_keeps_the_average(tmp_path):
    model, data = Walk(), DataLoader(torch.zeros(4, 1))
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[WeightEMA(0.35)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, data, data)
    assert model.walked == [1, 3, 6, 10, 15, 21, 28, 36]  # training itself is left alone
    expected = averages(model.walked, 0.35)
    assert model.scored == pytest.approx([expected[3]] * 4 + [expected[7]] * 4)
    assert model.weight.item() == pytest.approx(expected[7])
    assert model.frozen.item() == torch.tensor(0.1).item()
    assert model.mean.item() == pytest.approx(averages([10.0 * step for step in range(1, 9)], 0.35)[7])
    assert model.count.item() == 8


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ema", 0),
        ("ema", 1.0),
        ("ema", math.nan),
        ("lr", 0.0),
        ("lr", math.nan),
        ("lr_batch", 0),
        ("lr", math.inf),
        ("weight_decay", -1),
        ("momentum", 1),
        ("warmup_steps", -1),
    ],
)
def test_values_out_of_range(name, value):
    with pytest.raises(TrainingError) as refusal:
        OptimizerConfig(**{name: value})
    assert refusal.value.setting == f"optimizer.{name}"
