"""The box coder's gradients in closed form, against autograd through torchvision's coder and finite differences."""

import pytest
import torch
from support.crops import general_boxes, randn
from torchvision.models.detection._utils import BoxCoder

from detector.rcnn.box_coding import attached_boxes, attached_targets

WEIGHTS = [(1.0, 1.0, 1.0, 1.0), (10.0, 8.0, 5.0, 4.0)]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_decoded_boxes(weights):
    anchors, coder = general_boxes(6, (40, 50)), BoxCoder(weights)
    deltas = randn(6, 4)
    deltas[4, 2], deltas[5, 3] = 100.0, 100.0  # the coder holds sizes to 62.5 times the anchor's
    deltas.requires_grad_()
    expected = coder.decode_single(deltas, anchors)
    boxes = attached_boxes(expected, deltas, anchors, weights)
    assert torch.equal(boxes, expected)
    upstream = randn(6, 4, seed=1)
    (wanted,) = torch.autograd.grad(expected, deltas, upstream)
    (gradient,) = torch.autograd.grad(boxes, deltas, upstream)
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)
    assert not wanted[4, 2]
    assert not wanted[5, 3]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_targets(weights):
    coder, truth = BoxCoder(weights), general_boxes(6, (40, 50), seed=1)
    boxes = general_boxes(6, (40, 50)).requires_grad_()
    expected = coder.encode_single(truth, boxes)
    targets = attached_targets(expected, boxes, weights)
    assert torch.equal(targets, expected)
    upstream = randn(6, 4, seed=2)
    wanted = torch.autograd.grad(expected, boxes, upstream)
    torch.testing.assert_close(torch.autograd.grad(targets, boxes, upstream), wanted, rtol=1e-12, atol=1e-12)


def test_second_derivatives_are_those_of_the_coder():
    anchors, coder = general_boxes(3, (40, 50)), BoxCoder(WEIGHTS[1])

    def second(function):
        deltas = randn(3, 4).requires_grad_()
        (first,) = torch.autograd.grad(function(deltas).square().sum(), deltas, create_graph=True)
        return torch.autograd.grad(first.square().sum(), deltas)

    ours = second(lambda d: attached_boxes(coder.decode_single(d, anchors), d, anchors, WEIGHTS[1]))
    torch.testing.assert_close(ours, second(lambda d: coder.decode_single(d, anchors)), rtol=1e-10, atol=1e-10)
