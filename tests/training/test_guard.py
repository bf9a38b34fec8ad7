"""What is said of the box gradient in training, and when; that a run logs it is tested with the trainings."""

import json
from types import SimpleNamespace

import pytest
import torch
from support.tiny_models import tiny_rcnn

from detector import BoxGradient, swap_crop_head
from detector.training import guard
from detector.training.guard import LOOKS, BoxGradientGuard

FREE = BoxGradient.exact()


class Loop:
    """A training that stands still: each look is at a step with this reading and this RPN's own box loss."""

    def __init__(self, monkeypatch, settings=FREE, crop="affine", accumulated=1, log_every=50):
        self.guard, self.logged, self.watched, self.step, self.batch = BoxGradientGuard(), [], [], 0, 0
        self.task = SimpleNamespace(
            crop=crop, box_gradient=settings, model=swap_crop_head(tiny_rcnn(), settings), log_dict=self.logged.append
        )
        self.options = {"accumulate_grad_batches": accumulated, "log_every_n_steps": log_every}
        self.monkeypatch = monkeypatch

    def run(self, passed=None, loss=0.01, looks=1, steps=None, rank_0=True):
        seen = {} if passed is None else {"ratio": 2 * passed, "passed": passed}
        self.monkeypatch.setattr(guard.BoxGradientWatch, "reading", lambda watch: seen)
        metrics = {"train/loss_rpn_box_reg": torch.tensor(loss)}
        for _ in range((10 * looks if steps is None else steps) * self.options["accumulate_grad_batches"]):
            trainer = SimpleNamespace(
                global_step=self.step, is_global_zero=rank_0, callback_metrics=metrics, **self.options
            )
            self.guard.on_train_batch_start(trainer, self.task, None, self.batch)
            if self.task.model.rpn.box_gradient_watch is not None:
                self.watched.append((self.step, self.batch))
            self.batch += 1
            trainer.global_step = self.step = self.batch // self.options["accumulate_grad_batches"]
            self.guard.on_train_batch_end(trainer, self.task, {}, None, self.batch - 1)
        return self


def test_one_step_in_ten_is_watched_and_logged(monkeypatch):
    loop = Loop(monkeypatch).run(3.0, looks=3)
    assert [step for step, _ in loop.watched] == [9, 19, 29]
    assert loop.logged == [{"box_gradient/ratio": 6.0, "box_gradient/passed": 3.0}] * 3
    assert loop.task.model.rpn.box_gradient_watch is None


@pytest.mark.parametrize(("log_every", "steps"), [(1, list(range(20))), (4, [3, 7, 11, 15, 19]), (0, [9, 19])])
def test_as_often_as_a_logger_wants_it(monkeypatch, log_every, steps):
    assert [step for step, _ in Loop(monkeypatch, log_every=log_every).run(3.0, steps=20).watched] == steps


def test_of_accumulated_batches_the_last_is_watched(monkeypatch):
    assert Loop(monkeypatch, accumulated=3).run(3.0, looks=2).watched == [(9, 29), (19, 59)]


def test_a_stock_model_is_not_watched(monkeypatch):
    assert Loop(monkeypatch, crop="roi_align").run(3.0).logged == []


def test_a_gradient_that_takes_over_is_said_once_with_the_flag(monkeypatch, capsys):
    loop = Loop(monkeypatch)
    for passed in (10, 20, 30, 40, 69, 71, 80, 80, 80):
        loop.run(passed)
    assert capsys.readouterr().err == ""  # too few to judge
    loop.run(9000)
    assert capsys.readouterr().err == (
        "\nAfter step 100: the box gradient is taking over: at the RPN's deltas it is 70 times as strong as the "
        "gradient of the RPN's own box loss, in the median of 10 steps (box_gradient.bound is None). Start again with "
        "--model.box_gradient.bound 0.1\n"
    )
    loop.run(70, looks=30)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("passed", "says"), [(0.3, False), (0.6, True)])
def test_what_passes_the_bound_counts(monkeypatch, capsys, passed, says):
    Loop(monkeypatch, BoxGradient(bound=0.9)).run(passed, looks=20)
    assert ("taking over: at the RPN's deltas it is 0.6 times as strong" in capsys.readouterr().err) == says


def test_an_rpn_whose_own_loss_rises_is_said_with_the_flag(monkeypatch, capsys):
    loop = Loop(monkeypatch, BoxGradient(bound=0.3))
    for loss in (0.01, 0.004, 0.004, 0.008):  # as much comes without a box gradient
        loop.run(0.2, loss, looks=LOOKS)
    assert capsys.readouterr().err == ""
    loop.run(0.2, 0.06, looks=2 * LOOKS)
    assert capsys.readouterr().err == (
        "\nAfter step 500: the RPN's own box loss is 15 times as high as at its best (0.06, 0.004 before), while the "
        "box gradient moves the proposals (box_gradient.bound is 0.3). Start again with "
        "--model.box_gradient.bound 0.1\n"
    )


@pytest.mark.parametrize("settings", [BoxGradient(), BoxGradient(bound=0.01)])
def test_nothing_is_said_of_a_gradient_that_is_held_as_by_default(monkeypatch, capsys, settings):
    loop = Loop(monkeypatch, settings)
    for loss in (0.001, 1.0, 1.0):
        loop.run(70, loss, looks=LOOKS)
    assert capsys.readouterr().err == ""


def test_nothing_is_said_where_there_is_nothing_to_compare(monkeypatch, capsys):
    """With the gradient off, or on images without objects, whose loss is 0."""
    loop = Loop(monkeypatch)
    for loss in (0.0, 1.0, 1.0):
        loop.run(None, loss, looks=LOOKS)
    assert capsys.readouterr().err == ""


def test_only_the_first_process_speaks(monkeypatch, capsys):
    Loop(monkeypatch).run(70, looks=20, rank_0=False)
    assert capsys.readouterr().err == ""


def test_a_step_that_fails_leaves_no_watch(monkeypatch):
    loop = Loop(monkeypatch, log_every=1)
    trainer = SimpleNamespace(global_step=0, **loop.options)
    loop.guard.on_train_batch_start(trainer, loop.task, None, 0)
    assert loop.task.model.rpn.box_gradient_watch is not None
    loop.guard.on_exception(trainer, loop.task, RuntimeError("out of memory"))
    assert loop.task.model.rpn.box_gradient_watch is None


@pytest.mark.parametrize("stop", [1, 9, 10, 25])
def test_a_run_that_goes_on_judges_as_one_never_stopped(monkeypatch, capsys, stop):
    looks = [(0.2, 0.01 / (1 + n)) for n in range(20)] + [(0.2, 0.3)] * 10
    whole = Loop(monkeypatch)
    for look in looks:
        whole.run(*look)
    wanted = capsys.readouterr().err
    assert "After step 300: the RPN's own box loss" in wanted
    loop = Loop(monkeypatch)
    for look in looks[:stop]:
        loop.run(*look)
    again = BoxGradientGuard()
    again.load_state_dict(json.loads(json.dumps(loop.guard.state_dict())))
    loop.guard = again
    for look in looks[stop:]:
        loop.run(*look)
    assert capsys.readouterr().err == wanted
    assert again.state_dict() == whole.guard.state_dict()
