"""Effects of the box gradient on a training.

  python .github/assets/box_gradient.py table runs/SET-SETTING-SEED ...   the table of .github/MEASUREMENTS.md
  python .github/assets/box_gradient.py start COCO-FOLDER                 R50, random weights, 91 classes, 200 steps

The first reads the folders that tools/train.py wrote; the second trains in a plain loop, once for each setting.
"""

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev

import torch
import torchvision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.transforms.v2.functional import to_dtype

from detector import BoxGradient, swap_crop_head
from detector.data.dataset import CocoDetection
from detector.rcnn.watch import watch_box_gradient

SCORES = ("AP", "AP50", "AP75", "AP90")


def table(folders: list[Path]) -> None:
    runs: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for folder in folders:
        data, setting, _ = re.fullmatch(r"([^-]+)-(.+)-(\d+)", folder.name).groups()
        log = EventAccumulator(str(folder))
        log.Reload()
        tags = log.Tags()["scalars"]
        run = {name: json.loads((folder / "scores.json").read_text())[name] for name in SCORES}
        loss = [event.value for event in log.Scalars("train/loss_rpn_box_reg")]
        run["last"], run["highest"] = fmean(loss[-5:]), max(loss)
        ratios = [e.value for e in log.Scalars("box_gradient/ratio")] if "box_gradient/ratio" in tags else [0.0]
        run["ratio"] = sorted(ratios)[len(ratios) // 2]
        runs[data, setting].append(run)
    print("| data | box gradient | seeds | AP | AP50 | AP75 | AP90 | RPN's box loss, end / highest | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for (data, setting), values in sorted(runs.items()):
        row = [data, setting, str(len(values))]
        for name in SCORES:
            found = [run[name] for run in values]
            spread = f" ± {stdev(found):.3f}" if len(found) > 1 else ""
            row.append(f"{fmean(found):.3f}{spread} ({', '.join(f'{x:.3f}' for x in found)})")
        row.append(f"{fmean(r['last'] for r in values):.4f} / {max(r['highest'] for r in values):.3f}")
        row.append(f"{fmean(r['ratio'] for r in values):.0f}")
        print(f"| {' | '.join(row)} |")


def start(root: Path, steps: int, size: int, batch: int) -> None:
    data = CocoDetection(root / "train2017", root / "annotations" / "instances_train2017.json")
    images = [data[i] for i in range(len(data))]
    settings = {"off": BoxGradient(crop=0, coder=0), "default": BoxGradient(), "exact": BoxGradient.exact()}
    for name, box_gradient in settings.items():
        torch.manual_seed(0)
        model = torchvision.models.detection.fasterrcnn_resnet50_fpn(
            weights=None, weights_backbone=None, num_classes=91, min_size=size, max_size=2 * size
        )
        swap_crop_head(model, box_gradient).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9, weight_decay=1e-4)
        seen: dict[str, list[float]] = defaultdict(list)
        for step in range(steps):
            chosen = torch.randperm(len(images))[:batch].tolist()
            optimizer.param_groups[0]["lr"] = 0.005 * min(1.0, (step + 1) / 50)
            with watch_box_gradient(model) as watch:
                losses = model(
                    [to_dtype(images[i][0].as_subclass(torch.Tensor), torch.float32, scale=True) for i in chosen],
                    [{key: images[i][1][key].as_subclass(torch.Tensor) for key in ("boxes", "labels")} for i in chosen],
                )
                optimizer.zero_grad()
                sum(losses.values()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            for key, value in {**{k: v.item() for k, v in losses.items()}, **watch.reading()}.items():
                seen[key].append(value)
            if (step + 1) % 40 == 0:
                print(f"{name:8} {step + 1:4}", *(f"{k} {fmean(v):.4f}" for k, v in sorted(seen.items())), flush=True)
                seen.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("table").add_argument("runs", nargs="+", type=Path)
    starting = commands.add_parser("start")
    starting.add_argument("root", type=Path)
    starting.add_argument("--steps", type=int, default=200)
    starting.add_argument("--size", type=int, default=160)
    starting.add_argument("--batch", type=int, default=2)
    options = vars(parser.parse_args())
    if options.pop("command") == "table":
        table(options["runs"])
    else:
        start(**options)


if __name__ == "__main__":
    main()
