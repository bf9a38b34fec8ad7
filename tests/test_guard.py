"""What is said of the box gradient in training, and when; that a run logs it is tested with the trainings."""

import json
from types import SimpleNamespace

import pytest
import torch

from detector import BoxGradient
from detector.training import guard
from detector.training.guard import LOOKS, BoxGradientGuard

FREE = BoxGradient.exact()


class Loop:
    """A training that stands still: at each look, a step's ratio and the RPN's own box loss."""

    def __init__(self, monkeypatch, settings=FREE, crop="affine", watch=None):
        self.guard = watch or BoxGradientGuard()
        self.logged = []
        self.model = SimpleNamespace(rpn=SimpleNamespace(watch=None), roi_heads=SimpleNamespace(watch=None))
        self.task = SimpleNamespace(
            crop=crop, box_gradient=settings, model=self.model, log_dict=lambda values: self.logged.append(values)
        )
        self.step = 0
        self.monkeypatch = monkeypatch

    def look(self, ratio=None, loss=0.01, steps=10, rank_0=True):
        seen = {} if ratio is None else {"ratio": ratio}
        self.monkeypatch.setattr(guard.BoxGradientWatch, "reading", lambda watch: seen)
        for _ in range(steps):
            metrics = {"train/loss_rpn_box_reg": torch.tensor(loss)}
            trainer = SimpleNamespace(
                global_step=self.step, log_every_n_steps=10, is_global_zero=rank_0, callback_metrics=metrics
            )
            self.guard.on_train_batch_start(trainer, self.task, None, 0)
            self.watched = self.model.rpn.watch is not None
            trainer.global_step = self.step = self.step + 1
            self.guard.on_train_batch_end(trainer, self.task, {}, None, 0)
        return self


def test_one_step_in_as_many_as_are_logged_is_watched(monkeypatch):
    loop = Loop(monkeypatch)
    loop.look(3.0, steps=9)
    assert not loop.watched
    assert loop.logged == []
    loop.look(3.0, steps=1)
    assert loop.watched
    assert loop.logged == [{"box_gradient/ratio": 3.0}]
    assert loop.model.rpn.watch is None


def test_a_stock_model_is_not_watched(monkeypatch):
    assert Loop(monkeypatch, crop="roi_align").look(3.0).logged == []


def test_a_gradient_that_takes_over_is_said_once_with_the_flag(monkeypatch, capsys):
    loop = Loop(monkeypatch)
    for ratio in (50, 60, 70, 80):
        loop.look(ratio)
    assert capsys.readouterr().err == ""  # too few to judge
    loop.look(9000)
    assert capsys.readouterr().err == (
        "\nAfter step 50: the box gradient is taking over: at the RPN's deltas it is 70 times as strong as the gradient "
        "of the RPN's own box loss (median of 5 steps). Start again with --model.box_gradient.bound 0.1.\n"
    )
    for _ in range(30):
        loop.look(70)
    assert capsys.readouterr().err == ""


def test_what_the_bound_lets_through_counts(monkeypatch, capsys):
    for bound, says in ((0.1, False), (1.0, False), (3.0, True)):
        loop = Loop(monkeypatch, BoxGradient(bound=bound))
        for _ in range(20):
            loop.look(70)
        said = capsys.readouterr().err
        assert ("it is 3 times as strong" in said) == says
        assert bool(said) == says
        assert loop.logged[0] == {"box_gradient/ratio": 70}  # as it was before the bound


@pytest.mark.parametrize("settings", [FREE, BoxGradient(bound=0.9), BoxGradient(bound=0.05)])
def test_an_rpn_whose_own_loss_rises_is_said_with_the_flag(monkeypatch, capsys, settings):
    loop = Loop(monkeypatch, settings)
    for loss in [0.01] * 5 + [0.004] * 10 + [0.01] * 10:  # as much comes without a box gradient
        loop.look(0.5, loss)
    assert capsys.readouterr().err == ""
    for _ in range(15):
        loop.look(0.5, 0.06)
    off = "--model.box_gradient.crop 0 --model.box_gradient.coder 0"
    flag = off if settings.bound == 0.05 else "--model.box_gradient.bound 0.1"
    assert capsys.readouterr().err == (
        "\nAfter step 300: the RPN's own box loss is 15 times as high as at its best (0.06, 0.004 before), while the box "
        f"gradient moves the proposals. Start again with {flag}.\n"
    )


def test_nothing_is_said_of_a_gradient_that_is_off(monkeypatch, capsys):
    loop = Loop(monkeypatch, BoxGradient(crop=0, coder=0))
    for loss in [0.001] * LOOKS + [1.0] * LOOKS:
        loop.look(None, loss)
    assert capsys.readouterr().err == ""


def test_only_the_first_process_speaks(monkeypatch, capsys):
    loop = Loop(monkeypatch)
    for _ in range(20):
        loop.look(70, rank_0=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("stop", [1, 4, 5, 12])
def test_a_run_that_goes_on_judges_as_one_never_stopped(monkeypatch, capsys, stop):
    looks = [(0.5, 0.01 / (1 + n)) for n in range(10)] + [(0.5, 0.3)] * 5
    whole = Loop(monkeypatch)
    for look in looks:
        whole.look(*look)
    wanted = capsys.readouterr().err
    assert "After step 150: the RPN's own box loss" in wanted
    loop = Loop(monkeypatch)
    for look in looks[:stop]:
        loop.look(*look)
    again = BoxGradientGuard()
    again.load_state_dict(json.loads(json.dumps(loop.guard.state_dict())))
    loop.guard = again
    for look in looks[stop:]:
        loop.look(*look)
    assert capsys.readouterr().err == wanted
    assert again.state_dict() == whole.guard.state_dict()
