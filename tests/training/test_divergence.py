"""Warnings about a training that diverges."""

import json
import random
import re
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("timm")

from support.tiny_training import TINY, last_checkpoint

from detector.rcnn.box_gradient import BoxGradient
from detector.tools.training_cli import parse, training_parser
from detector.training import divergence
from detector.training.divergence import Divergence, warn_if_all_alike
from detector.training.optimization import OptimizerConfig
from detector.training.task import DetectionTask

TASK = SimpleNamespace(
    optimizer=OptimizerConfig(lr=0.25), crop="affine", box_gradient=BoxGradient.exact(), trainer_defaults={}
)


def feed(losses, watch=None, first=0, accumulated=1):
    """The callback after a training with these losses."""
    watch = watch or Divergence()
    for step, loss in enumerate(losses, start=first + 1):
        trainer = SimpleNamespace(is_global_zero=True, accumulate_grad_batches=accumulated, global_step=step)
        watch.on_train_batch_end(trainer, TASK, {"loss": torch.tensor(loss / accumulated)}, None, step)
    return watch


def noisy(means, seed=0):
    """As of batches of one image: exponentially distributed about their means."""
    generator = random.Random(seed)
    return [mean * generator.expovariate(1) for mean in means]


# Every tenth loss of two trainings on 140 photographs, 4 a batch: one that the box gradient wrecked, to an AP of 0.10
# against 0.59 without it, and one that began from a trained detector.
WRECKED = (
    "0.97 1.14 1.23 0.73 1.00 7.18 3.83 3.44 4.57 3.56 4.12 2.22 2.40 2.88 2.76 3.22 2.43 2.47 3.12 0.85 1.65 1.80 "
    "1.86 2.12 2.51 2.44 2.03 2.23 2.30 1.40 2.34"
)
WRECKED = [float(loss) for loss in WRECKED.split()]
TRAINED_ON = "0.37 0.24 0.59 0.42 0.65 0.62 0.26 0.38 0.49 0.58 0.35 0.50 0.33 0.24 0.27 0.25 0.30 0.21 0.17 0.20 0.20"
TRAINED_ON = [float(loss) for loss in TRAINED_ON.split()]
RISEN = [3 - 2.5 * step / 300 for step in range(300)] + [0.5 * 1.1 ** min(step, 44) for step in range(300)]


def test_a_loss_that_rises_and_stays_finite_is_reported_once(capsys):
    watch = feed(RISEN)
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line]
    step, times, batches = re.match(r"After step (\d+): .* ([\d.]+) times its best for (\d+)", said).groups()
    assert int(step) == 460  # blocks end at 10, 60, ..., 310: far from that to 360 on
    assert float(times) == pytest.approx(33 / 0.68, rel=0.05)
    assert int(batches) == 150
    assert re.search(r"lr \(0\.25\), or gradient_clip_val, or box_gradient\.bound 0\.1", said)
    assert "for 250 batches" in watch.warning(TASK)  # at the end


def test_the_box_gradient_is_not_blamed_if_it_is_off_or_bound():
    watch = feed(RISEN)
    for other in ({"crop": "roi_align"}, *({"box_gradient": g} for g in (BoxGradient(crop=0, coder=0), BoxGradient()))):
        assert "box_gradient" not in watch.warning(SimpleNamespace(**(vars(TASK) | other)))


def test_a_wrecked_training_is_reported_half_way(capsys):
    feed([loss for loss in WRECKED for _ in range(10)])
    (said,) = re.findall(r"After step (\d+): ", capsys.readouterr().err)
    assert int(said) <= 210


@pytest.mark.parametrize(
    "losses",
    [
        noisy([3 * 0.998**step + 0.3 for step in range(5000)]),
        noisy([0.3] * 20_000, seed=1),
        [0.4] * 100 + [0.75] * 300 + [0.4] * 300,  # the rate at its peak
        [loss for loss in TRAINED_ON for _ in range(10)],
        [3000.0 if step % 20 == 19 and step > 300 else 0.3 for step in range(900)],  # images out of all proportion
        [0.5] * 200 + [40.0] * 50 + [0.5] * 200,  # it finds back
        [33.0] * 20,
    ],
    ids=["falling", "flat", "bump", "trained on", "outliers", "recovers", "short"],
)
def test_no_false_alarm(losses, capsys):
    assert feed(losses).warning(TASK) is None
    assert capsys.readouterr().err == ""


def test_a_training_that_recovers_is_reported_once_and_not_at_the_end(capsys):
    watch = feed(RISEN + [0.6] * 100 + [50.0] * 200 + [0.6] * 100)
    assert capsys.readouterr().err.count("diverges") == 1
    assert watch.warning(TASK) is None


@pytest.mark.parametrize("stop", [3, 57, 405])
def test_a_resumed_run_judges_as_one_never_stopped(stop):
    whole, second = feed(RISEN), Divergence()
    second.load_state_dict(json.loads(json.dumps(feed(RISEN[:stop]).state_dict())))
    assert feed(RISEN[stop:], second, first=stop).state_dict() == whole.state_dict()


def test_accumulation_may_change_on_the_way(capsys):
    watch = feed([1.0] * 60, accumulated=8)
    assert feed([1.0] * 200, watch).warning(TASK) is None
    assert watch.now == watch.best == 1


def test_detections_that_are_all_alike():
    alike = [{"score": 0.55 + 0.005 * (number % 2)} for number in range(100)]
    assert "0.550 and 0.555" in warn_if_all_alike(alike)
    assert warn_if_all_alike([{"score": number / 100} for number in range(100)]) is None
    assert warn_if_all_alike([{"score": 0.55}] * 5) is None
    assert warn_if_all_alike([]) is None


@pytest.mark.slow
def test_a_training_warns_while_it_runs_and_at_its_end(digits, tmp_path, monkeypatch, capsys):
    """Real steps, two of which are accumulated; the loss grows a hundredfold, its gradient is clipped."""
    monkeypatch.setattr(divergence, "FIRST", 2)
    monkeypatch.setattr(divergence, "BLOCK", 1)
    original, losses = DetectionTask.training_step, []

    def growing(task, batch, number):
        loss = original(task, batch, number) * (100 if task.current_epoch else 1)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(DetectionTask, "training_step", growing)
    flags = ["--data.batch_size=2", "--trainer.accumulate_grad_batches=2", "--trainer.max_epochs=2"]
    cli = parse(training_parser(), [*TINY, f"--data.root={digits}", f"--run_dir={tmp_path / 'run'}", *flags])
    cli.train()
    assert cli.run.divergence.now == pytest.approx(losses[-1])
    assert cli.run.divergence.best == pytest.approx(min(fmean(losses[:2]), *losses[2:4]))
    said = capsys.readouterr()
    assert said.err.count("After step 3: the training diverges") == 1
    assert "WARNING: the training diverges" in said.out
    assert last_checkpoint(tmp_path / "run")["callbacks"]["Divergence"]["far"] == 4
