"""In all of Lightning's ways to count steps and scorings, a run that stops after any batch goes on exactly.

The checkpoints, the order of the batches and the trainer are real; the network is a single number.
"""

from contextlib import suppress

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


def run(folder, *, every=1, kill_after=None, ema=False, patience=None, **options):
    """A run that goes on from the folder's last checkpoint, if there is one."""
    model, checkpoints = Number(kill_after), Checkpoints(folder, every=every)
    callbacks = [checkpoints]
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
    "epochs, rare checkpoints": {"max_epochs": 3, "every": 4},
    "steps, to the end of an epoch": {"max_steps": 18},
    "steps, into an epoch": {"max_steps": 15, "every": 4},
    "accumulating": {"max_epochs": 3, "accumulate_grad_batches": 4},
    "scoring twice an epoch": {"max_epochs": 2, "val_check_interval": 3},
    "scoring by a share of the epoch": {"max_epochs": 2, "val_check_interval": 0.34, "every": 100},
    "scoring every four batches": {"max_epochs": 3, "check_val_every_n_epoch": None, "val_check_interval": 4},
    "steps to a scoring": {"max_steps": 9, "val_check_interval": 3},
    "scoring every second epoch": {"max_epochs": 4, "check_val_every_n_epoch": 2},
    "not scoring": {"max_epochs": 3, "limit_val_batches": 0},
    "parts of epochs": {"max_epochs": 3, "limit_train_batches": 4},
    "averaging": {"max_epochs": 2, "ema": True},
    "averaging, steps": {"max_steps": 9, "ema": True},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_goes_on_exactly_after_any_batch(way, tmp_path):
    whole = run(tmp_path / "whole", **way)
    assert len(whole.seen) >= 9
    last, best = content(tmp_path / "whole", "last.ckpt"), content(tmp_path / "whole", "best.ckpt")
    assert last[0] >= (whole.scored_step or 0)
    if not way.get("ema"):
        assert last == (whole.trainer.global_step, whole.weight.item())
    for batches in range(1, len(whole.seen)):
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


def test_a_finished_run_is_not_trained_further(tmp_path):
    first = run(tmp_path, max_epochs=2)
    second = run(tmp_path, max_epochs=2)
    assert second.seen == []
    assert second.weight.item() == first.weight.item()


def test_other_data_or_batches_are_refused(tmp_path, monkeypatch):
    run(tmp_path, max_epochs=2, kill_after=8)
    monkeypatch.setattr(f"{__name__}.IMAGES", 14)
    with pytest.raises(Exception, match="trained with training images 12, this run has 14: go on with the same data"):
        run(tmp_path, max_epochs=2)
