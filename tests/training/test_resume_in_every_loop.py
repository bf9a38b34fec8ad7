"""A run that stops after any batch resumes exactly, in each of Lightning's ways to count steps and validations.

The checkpoints, the order of the batches and the trainer are real; the network is a single number.
"""

from contextlib import suppress
from types import SimpleNamespace

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch.utils.data import DataLoader

from detector.pretrained.loading import CHECKPOINT_KEY
from detector.training.checkpoints import AtomicCheckpointIO, Checkpoints
from detector.training.data import CocoDataModule
from detector.training.optimization import WeightEMA

IMAGES = 12  # six batches an epoch


class Killed(BaseException):
    pass


class Indices:
    def __init__(self, images):
        self.image_ids = list(range(images))

    def __len__(self):
        return len(self.image_ids)

    def __getitem__(self, index):
        return index

    def with_layers(self):
        return self

    def sizes(self):
        return np.array([[2, 1]] * len(self))


class Data(CocoDataModule):
    def __init__(self):
        super().__init__("nowhere", seed=0)

    def setup(self, stage=None):
        self.train_set, self.val_set = Indices(IMAGES), Indices(3)

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch

    def _loader(self, dataset, batches):
        return DataLoader(dataset, batch_sampler=batches, collate_fn=list)


class Number(lightning.LightningModule):
    """Keeps a record of what it was trained on, and when it was scored."""

    def __init__(self, kill_after=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.kill_after = kill_after
        self.seen, self.scored, self.scored_step = [], [], None

    def training_step(self, batch, number):
        if len(self.seen) == self.kill_after:
            raise Killed
        self.seen.append((self.current_epoch, number, batch))
        value = sum(index + 1 for _, index in batch) + 3 * batch[0][0] + 0.7 * number + self.current_epoch
        return ((self.weight * value - 1) ** 2).sum() * 1e-3

    def validation_step(self, batch, number):
        pass

    def on_validation_epoch_end(self):
        self.scored_step = self.global_step
        self.scored.append((self.current_epoch, self.global_step))
        self.log("val/AP", float(self.global_step % 5))

    def on_save_checkpoint(self, checkpoint):
        checkpoint[CHECKPOINT_KEY] = {}

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 1e-3, momentum=0.9)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def run(folder, *, every=1, kill_after=None, ema=False, patience=None, others=(), **options):
    """Train, from the folder's last checkpoint if there is one."""
    model, checkpoints = Number(kill_after), Checkpoints(folder, every=every)
    callbacks = [checkpoints, *others]
    if ema:
        callbacks.append(WeightEMA(0.9))
    if patience is not None:
        callbacks.append(EarlyStopping("val/AP", mode="max", patience=patience))
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        default_root_dir=folder,
        **options,
    )
    last = checkpoints.last if checkpoints.last.exists() else None
    with suppress(Killed):
        trainer.fit(model, datamodule=Data(), ckpt_path=last, weights_only=True)
    return model


def content(folder, name):
    path = folder / name
    if not path.exists():
        return None
    checkpoint = torch.load(path, weights_only=True)
    return checkpoint["global_step"], checkpoint["state_dict"]["weight"].item()


WAYS = {
    "epochs": {"max_epochs": 3},
    "steps, to the end of an epoch": {"max_steps": 18},
    "steps, into an epoch, averaging": {"max_steps": 15, "every": 4, "ema": True},
    "accumulating": {"max_epochs": 3, "accumulate_grad_batches": 4},
    "scoring twice an epoch": {"max_epochs": 2, "val_check_interval": 3},
    "scoring by a share of the epoch": {"max_epochs": 2, "val_check_interval": 0.34, "every": 100},
    "scoring every four batches": {"max_epochs": 3, "check_val_every_n_epoch": None, "val_check_interval": 4},
    "scoring every second epoch": {"max_epochs": 4, "check_val_every_n_epoch": 2},
    "not scoring": {"max_epochs": 3, "limit_val_batches": 0},
    "parts of epochs": {"max_epochs": 3, "limit_train_batches": 4},
}


@pytest.mark.parametrize(
    "points", [(6, 7), pytest.param((1, 3, 4, 8, 11, 12, 13), marks=pytest.mark.slow)], ids=["some", "others"]
)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_resumes_exactly_after_any_batch(way, points, tmp_path):
    whole = run(tmp_path / "whole", **way)
    assert len(whole.seen) >= 9
    last, best = content(tmp_path / "whole", "last.ckpt"), content(tmp_path / "whole", "best.ckpt")
    assert last[0] >= (whole.scored_step or 0)
    if not way.get("ema"):
        assert last == (whole.trainer.global_step, whole.weight.item())
    for batches in (point for point in points if point < len(whole.seen)):
        folder = tmp_path / str(batches)
        first = run(folder, kill_after=batches, **way)
        assert len(first.seen) == batches
        second = run(folder, **way)
        assert second.seen == whole.seen[-len(second.seen) :]
        assert second.weight.item() == whole.weight.item()
        assert content(folder, "last.ckpt") == last
        assert content(folder, "best.ckpt") == best
        assert sorted({*first.scored, *second.scored}) == whole.scored


@pytest.mark.parametrize("interval", [1.0, 4])
def test_last_is_where_an_early_stop_left_off(interval, tmp_path):
    model = run(tmp_path, max_epochs=30, patience=1, every=100, val_check_interval=interval)
    assert model.trainer.global_step < 60
    assert content(tmp_path, "last.ckpt") == (model.trainer.global_step, model.weight.item())


def test_best_has_the_weights_that_were_scored(tmp_path):
    model = run(tmp_path, max_epochs=3, check_val_every_n_epoch=None, val_check_interval=4)
    assert model.scored == [(0, 4), (1, 8), (1, 12), (2, 16)]
    assert content(tmp_path, "best.ckpt")[0] == 4  # scores are 4, 3, 2, 1


class Stop(lightning.Callback):
    """Asks the run to stop at the given call of one of its hooks."""

    def __init__(self, hook, calls, do=None):
        def called(trainer, *arguments):
            self.left -= 1
            if self.left == 0:
                trainer.should_stop = True
                if do is not None:
                    do(trainer)

        self.left = calls
        setattr(self, hook, called)


ENDS = {
    "early stopping": {"patience": 1},
    "early stopping at its best": {"stop": ("on_train_epoch_end", 2)},
    "early stopping within an epoch": {"patience": 1, "val_check_interval": 4, "every": 100},
    "early stopping, no scoring every epoch": {"patience": 1, "check_val_every_n_epoch": 2},
    "early stopping, averaging": {"patience": 1, "ema": True},
    "within an epoch": {"stop": ("on_train_batch_end", 9)},
    "within an epoch, no scoring": {"stop": ("on_train_batch_end", 9), "limit_val_batches": 0},
    "within a step": {"stop": ("on_train_batch_end", 9), "accumulate_grad_batches": 2},
    "before an epoch": {"stop": ("on_train_epoch_start", 3)},
    "after a scoring within an epoch": {"stop": ("on_validation_end", 2), "val_check_interval": 4},
    "not before the least epochs": {"stop": ("on_train_batch_end", 3), "min_epochs": 2},
    "not before the least steps": {"stop": ("on_train_batch_end", 3), "min_steps": 8},
    "epochs": {"max_epochs": 3},
    "steps": {"max_steps": 9},
}


@pytest.mark.parametrize("way", ENDS.values(), ids=ENDS.keys())
def test_a_run_that_ended_is_not_trained_further(way, tmp_path):
    options = {"max_epochs": 30} | {name: value for name, value in way.items() if name != "stop"}
    first = run(tmp_path, others=[Stop(*way["stop"])] if "stop" in way else (), **options)
    assert 4 <= first.trainer.global_step <= 40
    files = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.glob("*.ckpt")}
    before = {path.name: content(tmp_path, path.name) for path in files}
    assert before["last.ckpt"][0] == first.trainer.global_step
    again = run(tmp_path, **options)
    assert again.seen == again.scored == []
    assert again.trainer.global_step == first.trainer.global_step
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.glob("*.ckpt")} == files


def test_a_run_that_ended_by_its_epochs_resumes_with_more(tmp_path):
    run(tmp_path / "whole", max_epochs=3)
    run(tmp_path / "run", max_epochs=2)
    assert len(run(tmp_path / "run", max_epochs=3).seen) == 6
    assert content(tmp_path / "run", "last.ckpt") == content(tmp_path / "whole", "last.ckpt")


@pytest.mark.parametrize(("limit", "accumulate"), [(8, 1), (9, 2)])
def test_a_run_whose_time_was_up_resumes_only_with_more_time(limit, accumulate, tmp_path, monkeypatch):
    """A batch takes a second, by a clock of the test's."""
    now = [0.0]
    monkeypatch.setattr("lightning.pytorch.callbacks.timer.time", SimpleNamespace(monotonic=lambda: now[0]))
    step = Number.training_step

    def tick(model, *arguments):
        now[0] += 1
        return step(model, *arguments)

    monkeypatch.setattr(Number, "training_step", tick)
    options = {"max_epochs": 3, "accumulate_grad_batches": accumulate}
    first = run(tmp_path / "run", max_time={"seconds": limit}, **options)
    assert len(first.seen) == limit
    last = (tmp_path / "run" / "last.ckpt").read_bytes()
    for _ in range(2):
        assert run(tmp_path / "run", max_time={"seconds": limit}, **options).seen == []
        assert (tmp_path / "run" / "last.ckpt").read_bytes() == last
    assert run(tmp_path / "run", max_time={"seconds": 100}, **options).seen[-1] == run(tmp_path, **options).seen[-1]
    assert content(tmp_path / "run", "last.ckpt") == content(tmp_path, "last.ckpt")


def test_a_signal_does_not_undo_the_end_of_a_run(tmp_path):
    """It comes after the last step, as a callback ends the run."""
    stop = Stop("on_train_epoch_end", 2, lambda trainer: setattr(trainer.checkpoint_callback, "signal", 15))
    first = run(tmp_path, max_epochs=30, others=[stop])
    assert len(first.seen) == 12
    assert run(tmp_path, max_epochs=30).seen == []


def test_other_data_or_batches_are_refused(tmp_path, monkeypatch):
    run(tmp_path, max_epochs=2, kill_after=8)
    monkeypatch.setattr(f"{__name__}.IMAGES", 14)
    with pytest.raises(Exception, match="training images 12, this run has 14"):
        run(tmp_path, max_epochs=2)
