import copy
import io

import pytest
import torch
import torchvision
from support.tiny_models import batch, copies, tiny_rcnn
from torchvision.models import detection
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign

from detector import BoxGradient, MultiScaleAffineCrop, restore_roi_align, swap_crop_head

EVERY_LOSS = ("box", "classification", "mask", "keypoint")
LARGE = ["fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"]
BUILDERS = ["fasterrcnn_mobilenet_v3_large_320_fpn", *(pytest.param(n, marks=pytest.mark.slow) for n in LARGE)]
TINY = ["box", "mask", "keypoint", "single scale"]


def build(name, **options):
    """A detector with random weights that answers with a few detections, whatever their score."""
    torch.manual_seed(0)
    if name in TINY:
        return tiny_rcnn("box" if name == "single scale" else name, fpn=name != "single scale", **options)
    small = {
        "weights": None,
        "weights_backbone": None,
        "min_size": 128,
        "max_size": 192,
        "rpn_pre_nms_top_n_test": 100,
        "rpn_post_nms_top_n_test": 30,
        "box_score_thresh": 0.0,
        "box_detections_per_img": 5,
    }
    return getattr(detection, name)(**small | options)


def photographs():
    generator = torch.Generator().manual_seed(5)
    return [torch.rand(3, height, width, generator=generator) for height, width in ((128, 160), (150, 110))]


def detect(model, images=None):
    with torch.no_grad():
        return model.eval()(photographs() if images is None else images)


def training_losses(model):
    torch.manual_seed(1)
    images, targets = batch()
    return model.train()(images, copies(targets))


def assert_same(detections, expected, exact=False):
    assert len(detections) == len(expected)
    for ours, theirs in zip(detections, expected):
        assert ours.keys() == theirs.keys()
        assert len(theirs["boxes"])  # two empty lists are equal
        assert torch.equal(ours["labels"], theirs["labels"])
        for key, wanted in theirs.items():
            assert ours[key].dtype == wanted.dtype
            if exact:
                assert torch.equal(ours[key], wanted)
            else:
                # Boxes and keypoints are in pixels, the others in 0..1 (scores of keypoints are logits).
                atol = 1e-2 if key in ("boxes", "keypoints") else 1e-4
                torch.testing.assert_close(ours[key], wanted, rtol=0, atol=atol)


def classes(model):
    return {name: type(module) for name, module in model.named_modules()}


@pytest.mark.parametrize("name", BUILDERS + TINY)
def test_detections_equal_those_of_the_stock_model_and_restore_gives_it_back(name):
    model = build(name)
    expected, before, keys = detect(model), classes(model), list(model.state_dict())
    parameters = dict(model.named_parameters())

    assert swap_crop_head(model) is model
    assert_same(detect(model), expected)
    assert list(model.state_dict()) == keys
    assert all(parameters[n] is p for n, p in model.named_parameters())
    changed = {n for n, kind in classes(model).items() if kind is not before[n]}
    pools = {"roi_heads.box_roi_pool", "roi_heads.mask_roi_pool", "roi_heads.keypoint_roi_pool"} & set(before)
    assert changed == {"rpn", "roi_heads"} | pools
    assert all(isinstance(model.get_submodule(pool), MultiScaleAffineCrop) for pool in pools)

    assert restore_roi_align(model) is model
    assert classes(model) == before
    assert_same(detect(model), expected, exact=True)


@pytest.mark.parametrize("name", ["mask", "single scale"])
def test_the_restored_model_trains_as_the_stock_one(name):
    stock = build(name).train()
    restored = swap_crop_head(copy.deepcopy(stock), BoxGradient(losses=EVERY_LOSS))
    training_losses(restored)  # a step in between leaves nothing behind
    restore_roi_align(restored)
    losses = [training_losses(model) for model in (stock, restored)]
    gradients = [
        torch.autograd.grad(sum(one.values()), list(m.parameters())) for m, one in zip((stock, restored), losses)
    ]
    assert losses[0] == losses[1]
    assert all(map(torch.equal, *gradients))


class Unresized(GeneralizedRCNNTransform):
    def resize(self, image, target=None):
        return image, target


# With a height below 23 pixels, 33 to 45, or 65 to 67, a map divided by the image is twice the scale, or more.
@pytest.mark.parametrize("sizes", [[(1, 1)], [(20, 128)], [(700, 66)], [(40, 600)], [(45, 45), (33, 35)]], ids=str)
@pytest.mark.parametrize("name", ["box", "single scale"])
def test_images_of_any_size(name, sizes):
    stock, swapped = build(name).double(), swap_crop_head(build(name).double())  # rounding decides nothing
    for model in (stock, swapped):
        model.transform = Unresized(64, 64, [0.5] * 3, [0.25] * 3)
    detect(stock, [torch.rand(3, 128, 128).double()])  # torchvision's pooler takes its scales from its first image
    images = [torch.rand(3, *size).double() for size in sizes]
    for found, wanted in zip(detect(swapped, images), detect(stock, images), strict=True):
        if len(wanted["boxes"]):  # not in every image of a few pixels
            assert_same([found], [wanted])
        else:
            assert not len(found["boxes"])


def test_a_transform_that_pads_to_another_multiple():
    stock, swapped = build("box"), build("box")
    for model in (stock, swapped):
        model.transform = Unresized(64, 64, [0.5] * 3, [0.25] * 3, size_divisible=128)
    swap_crop_head(swapped)
    detect(stock, [torch.rand(3, 128, 128)])
    images = [torch.rand(3, 20, 30)]
    assert_same(detect(swapped, images), detect(stock, images))
    restore_roi_align(swapped)
    assert "size_divisible" not in swapped.roi_heads.box_roi_pool.__dict__


def test_nothing_of_torchvision_is_patched():
    def state():
        classes = RegionProposalNetwork, RoIHeads, MultiScaleRoIAlign, detection.FasterRCNN
        attributes = [{k: v for k, v in vars(cls).items() if not k.startswith("_abc")} for cls in classes]
        return attributes, torchvision.ops.roi_align, torchvision.ops.poolers.roi_align

    before, other = state(), build("mask")
    training_losses(swap_crop_head(build("mask")))
    assert state() == before
    assert box_gradient_of(other) is None


@pytest.mark.parametrize("when", ["before", "after"])
def test_weights_load_before_or_after(when):
    trained, model, stock = build("mask", seed=3), build("mask"), build("mask")
    expected = detect(trained)
    for step in ("before", "swap", "after"):
        if step == when:
            model.load_state_dict(trained.state_dict())
        elif step == "swap":
            swap_crop_head(model)
    assert_same(detect(model), expected)
    stock.load_state_dict(model.state_dict())  # and back
    assert_same(detect(stock), expected, exact=True)


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, saved_and_loaded], ids=["deepcopy", "save"])
@pytest.mark.parametrize("used", [False, True])
def test_a_swapped_model_can_be_copied_and_pickled(duplicate, used):
    settings = BoxGradient(crop=0.5, losses=("box", "mask"))
    model = swap_crop_head(build("mask"), settings)
    if used:
        sum(training_losses(model).values()).backward()
    twin = duplicate(model)
    assert classes(twin) == classes(model)
    assert twin.roi_heads.box_gradient == settings
    assert_same(detect(twin), detect(model), exact=True)
    # The twin is a model of its own.
    restore_roi_align(twin)
    assert isinstance(model.roi_heads.box_roi_pool, MultiScaleAffineCrop)
    assert type(twin.roi_heads) is RoIHeads


EXACT = BoxGradient.exact()  # lets the gradient pass without the RPN's own loss


def box_gradient_of(model):
    loss = training_losses(model)["loss_box_reg"]
    return torch.autograd.grad(loss, model.rpn.head.bbox_pred.weight, allow_unused=True)[0]


def test_a_second_swap_changes_the_settings():
    model = swap_crop_head(build("box"), EXACT)
    both = box_gradient_of(model)
    kinds = classes(model)
    assert box_gradient_of(swap_crop_head(model, BoxGradient(crop=0, coder=0))) is None
    half = box_gradient_of(swap_crop_head(model, BoxGradient(crop=0.5, coder=0.5, bound=None)))
    torch.testing.assert_close(half, both / 2, rtol=1e-4, atol=1e-7)
    assert classes(model) == kinds
    torch.testing.assert_close(box_gradient_of(swap_crop_head(model, EXACT)), both)
    assert swap_crop_head(model).rpn.box_gradient == model.roi_heads.box_gradient == BoxGradient()
    assert box_gradient_of(restore_roi_align(model)) is None
    assert type(restore_roi_align(model).roi_heads) is RoIHeads


class OwnHeads(RoIHeads):
    """A user's subclass that changes one step and has no forward of its own."""

    def postprocess_detections(self, *args):
        boxes, scores, labels = super().postprocess_detections(*args)
        return boxes, [s / 2 for s in scores], labels


class OwnRPN(RegionProposalNetwork):
    def forward(self, images, features, targets=None):
        return super().forward(images, features, targets)


class OwnQuietRPN(RegionProposalNetwork):
    def filter_proposals(self, *args):
        boxes, scores = super().filter_proposals(*args)
        few = None if self.training else 10
        return [b[:few] for b in boxes], [s[:few] for s in scores]


def test_a_subclass_of_the_heads_keeps_what_it_changes():
    model = build("box")
    model.roi_heads.__class__ = OwnHeads
    model.rpn.__class__ = OwnQuietRPN
    expected = detect(model)
    assert max(d["scores"].max() for d in expected) < 0.5
    swap_crop_head(model, EXACT)
    assert isinstance(model.roi_heads, OwnHeads)
    assert isinstance(model.rpn, OwnQuietRPN)
    assert_same(detect(model), expected)
    assert box_gradient_of(model).any()
    assert_same(detect(copy.deepcopy(model)), expected)
    restore_roi_align(model)
    assert type(model.roi_heads) is OwnHeads
    assert type(model.rpn) is OwnQuietRPN
    assert_same(detect(model), expected, exact=True)


def test_a_pool_with_aligned_true_cannot_be_restored():
    model = build("box")
    pool = MultiScaleAffineCrop(["0", "1", "2"], 3, 2, aligned=True)
    model.roi_heads.box_roi_pool = pool
    swap_crop_head(model)
    assert pool.aligned  # a pool that is ours already stays as it was built
    before = classes(model)
    with pytest.raises(ValueError, match="aligned=True"):
        restore_roi_align(model)
    assert classes(model) == before


def test_hooks_of_the_user_survive():
    model = build("mask")
    names, calls = ["rpn", "roi_heads.box_roi_pool", "roi_heads.mask_roi_pool", "roi_heads"], []
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    for change in (swap_crop_head, restore_roi_align, lambda m: swap_crop_head(m, BoxGradient(losses=EVERY_LOSS))):
        detect(change(model))
        assert calls == names
        calls.clear()
    # In training, AttachedRoIHeads has hooks of its own.
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    training_losses(model)
    assert calls == names
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks


class OwnPool(MultiScaleRoIAlign):
    pass


@pytest.mark.parametrize(
    ("part", "change", "named"),
    [
        ("rpn", OwnRPN, "OwnRPN"),
        ("roi_heads.mask_roi_pool", OwnPool, "OwnPool"),
        ("rpn", None, "RegionProposalNetwork"),  # a forward of the instance
        ("roi_heads", None, "RoIHeads"),
        ("roi_heads.mask_roi_pool", None, "MultiScaleRoIAlign"),
    ],
)
def test_modules_that_cannot_be_swapped_are_named_and_nothing_is_changed(part, change, named):
    model = build("mask")
    module = model.get_submodule(part)
    if change is None:
        module.forward = type(module).forward.__get__(module)
    else:
        module.__class__ = change
    before = classes(model)
    with pytest.raises(TypeError, match=named):
        swap_crop_head(model)
    assert classes(model) == before


@pytest.mark.parametrize("function", [swap_crop_head, restore_roi_align])
@pytest.mark.parametrize("name", ["retinanet_resnet50_fpn", "ssd300_vgg16", "fcos_resnet50_fpn", "a layer"])
def test_a_model_without_a_roi_pooler(function, name):
    with torch.device("meta"):  # nothing is computed
        detectors = {} if name == "a layer" else {"weights": None, "weights_backbone": None}
        model = getattr(detection, name)(**detectors) if detectors else torch.nn.Linear(1, 1)
    with pytest.raises(TypeError, match=type(model).__name__):
        function(model)
