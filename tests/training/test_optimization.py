"""Optimizer, schedules and averages against their formulas."""

import math
import warnings

import lightning
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel
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
    """One layer of each kind that torchvision's and timm's detectors have; a frozen stem, and a layer used twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).requires_grad_(False)
        self.body = nn.Sequential(
            nn.Conv2d(4, 4, 3, groups=2), nn.GroupNorm(2, 4), nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4)
        )
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 5)
        self.again = self.head
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.body[0].bias.requires_grad_(False)


DECAYING = {"body.0.weight", "up.weight", "head.weight"}
STEADY = {
    "body.1.weight",
    "body.1.bias",
    "body.3.weight",
    "body.3.bias",
    "up.bias",
    "norm.weight",
    "norm.bias",
    "head.bias",
    "scale",
}
FROZEN = {"stem.0.weight", "stem.0.bias", "stem.1.weight", "stem.1.bias", "body.0.bias"}


def test_weights_decay_and_norms_and_biases_do_not():
    model = SmallDetector()
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert set(names.values()) == DECAYING | STEADY | FROZEN
    decays = [
        (names[p], group["weight_decay"])
        for group in make_optimizer(model, OptimizerConfig(weight_decay=0.05), 1).param_groups
        for p in group["params"]
    ]
    assert len(decays) == len(DECAYING | STEADY)  # each exactly once
    assert dict(decays) == dict.fromkeys(DECAYING, 0.05) | dict.fromkeys(STEADY, 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_groups_without_parameters_are_left_out(name):
    config = OptimizerConfig(name=name)
    for layer, decay in ((nn.Linear(2, 2, bias=False), config.weight_decay), (nn.LayerNorm(3), 0.0)):
        (group,) = make_optimizer(layer, config, 0.1).param_groups
        assert group["weight_decay"] == decay


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_by_hand(name):
    """On one bias: AdamW with PyTorch's usual betas, SGD with the momentum that was asked for."""
    model = nn.Module()
    model.bias = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = make_optimizer(model, OptimizerConfig(name=name, momentum=0.7), 0.1)
    value, first, second = 1.0, 0.0, 0.0
    for step, gradient in enumerate((2.0, -3.0), start=1):
        model.bias.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        if name == "sgd":
            first = 0.7 * first + gradient
            value -= 0.1 * first
        else:
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            value -= 0.1 * (first / (1 - 0.9**step)) / (math.sqrt(second / (1 - 0.999**step)) + 1e-8)
        assert model.bias.item() == pytest.approx(value, rel=1e-12)


def course(config, steps, epochs, peak=0.4, name="adamw"):
    """The rate of each step, as a run has it: the optimizer's, in every group."""
    optimizer = make_optimizer(nn.Linear(2, 2), OptimizerConfig(name=name), peak)
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule = make_schedule(optimizer, config, steps, epochs)
        for _ in range(steps):
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
    warmup_steps=st.integers(0, 600),
    milestones=st.lists(st.integers(0, 30), max_size=3, unique=True).map(sorted).map(tuple),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    config=CONFIGS,
    steps=st.integers(1, 500),
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

    def fresh():
        optimizer = make_optimizer(nn.Linear(2, 2), config, 0.4)
        return optimizer, make_schedule(optimizer, config, 100, 10)

    def steps(optimizer, course, count):
        rates = []
        for _ in range(count):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            course.step()
        return rates

    first = fresh()
    whole = steps(*first, 100)
    first = fresh()
    rates = steps(*first, stop)
    second = fresh()
    for after, before in zip(second, first):
        after.load_state_dict(before.state_dict())
    assert rates + steps(*second, 100 - stop) == pytest.approx(whole, rel=1e-12)


def averages(values, decay):
    """In float64: the first value, then moves by 1 - min(decay, (1 + n) / (10 + n)) after n steps."""
    average, found = values[0], [values[0]]
    for number, value in enumerate(values[1:], start=1):
        share = min(decay, (1 + number) / (10 + number))
        average = share * average + (1 - share) * value
        found.append(average)
    return found


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    values=st.lists(st.floats(-100, 100), min_size=1, max_size=40),
    decay=st.sampled_from([1e-3, 0.3, 0.5, 0.9, 0.9998]) | st.floats(0.001, 0.999),
)
def test_the_average_of_the_weights_by_hand(values, decay):
    model = nn.BatchNorm1d(1, dtype=torch.float64)  # weight, bias, running mean and variance, and a counter
    averaged = AveragedModel(model, use_buffers=True, multi_avg_fn=WeightEMA(decay)._kwargs["multi_avg_fn"])
    for step, (value, expected) in enumerate(zip(values, averages(values, decay))):
        with torch.no_grad():
            model.weight.fill_(value)
            model.running_mean.fill_(value)
            model.num_batches_tracked.fill_(1000 * step + 7)
        averaged.update_parameters(model)
        assert averaged.module.weight.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert averaged.module.running_mean.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert averaged.module.bias.item() == 0
        assert averaged.module.num_batches_tracked.item() == 1000 * step + 7
        assert averaged.module.num_batches_tracked.dtype == torch.int64


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
    [("ema", 0), ("ema", 1.0), ("ema", 9998), ("ema", math.nan), ("lr", 0.0), ("lr", math.nan), ("lr_batch", 0)],
)
def test_values_out_of_range(name, value):
    with pytest.raises(TrainingError) as refusal:
        OptimizerConfig(**{name: value})
    assert refusal.value.setting == f"optimizer.{name}"
