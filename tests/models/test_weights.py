"""Files of weights: nothing in them is executed, and damage is detected."""

import pytest
import torch

from detector.errors import ModelError
from detector.models.build import build_detector
from detector.models.config import DetectorConfig
from detector.models.weights import load_weights, read_weights


def linear():
    return torch.nn.Linear(2, 3)


def test_nothing_is_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"state": Trap()}, tmp_path / "trap.pth")
    (tmp_path / "text.pth").write_text("no weights")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"a": torch.rand(1000)}, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:900])
    for name in ("trap.pth", "text.pth", "list.pth", "cut.pth", "none.pth"):
        with pytest.raises(ModelError, match=name):
            read_weights(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.index_fill(0, torch.tensor(1), float("nan")),
        lambda value: value.index_fill(0, torch.tensor(1), float("inf")),
        lambda value: value.long(),
        lambda value: value.to(torch.complex64),
        lambda value: value.to_sparse(),
        lambda value: value.to("meta"),
        lambda value: torch.zeros(1).expand(3),
        lambda value: torch.zeros(4),
        lambda value: [1, 2, 3],
    ],
)
def test_tensors_that_do_not_fit_are_refused(change):
    state = linear().state_dict()
    assert torch.equal(load_weights(linear, state).bias, state["bias"])
    with pytest.raises(ModelError):
        load_weights(linear, state | {"bias": change(state["bias"])})


@pytest.mark.parametrize("state", [{"weight": torch.zeros(3, 2)}, {**linear().state_dict(), "more": torch.zeros(1)}])
def test_missing_and_unknown_names_are_refused(state):
    with pytest.raises(ModelError, match="missing"):
        load_weights(linear, state)


def test_a_network_that_cannot_be_built_is_refused():
    def unknown():
        return build_detector(DetectorConfig(name="timm/resnet18", weights_backbone="COCO_V1"), 2)

    pytest.importorskip("timm")
    for build in (unknown, lambda: torch.nn.Linear(2**40, 2**40)):  # too large for an integer
        with pytest.raises(ModelError, match=r"^cannot be built: "):
            load_weights(build, {})


def test_the_format_before_checksums_is_read_only_on_request(tmp_path):
    path = tmp_path / "old.pth"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert read_weights(path, legacy=True)["a"].tolist() == [1, 1]
    path.write_text("# no weights")
    with pytest.raises(ModelError) as error:
        read_weights(path, legacy=True)
    assert "weights_only" not in str(error.value)
    with pytest.raises(ModelError, match=r"old\.pth"):
        read_weights(path)
