"""Run everything at COCO's size, on what coco_sized.py wrote, and print the time and the memory of each process.

    python .github/assets/coco_sized.py FOLDER && python .github/assets/rehearsal.py FOLDER --output WORK

Reading, loader workers, check.py, browse.py, train.py (killed, resumed, and as two ranks), eval.py and predict.py
on the 5,000 images of val2017, refine.py: with a tiny detector, on a CPU, in about 16 minutes. Needs Linux: memory is
read from /proc, five times a second. Resident memory counts what processes share, once in each of them; "own" is what a
process has written to and shares with none (Private_Dirty).
"""

import argparse
import contextlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from torch.utils.data import DataLoader, Dataset

REPOSITORY = Path(__file__).parents[2]
TINY = [
    "--config=configs/quickstart.yaml",
    "--data.generate=null",
    "--model.box_gradient={crop: 1, coder: 1, bound: 0.1}",
    "--model.refinement=null",
    "--data.train_split=train2017",
    "--data.min_size=128",
    "--data.max_size=160",
    "--model.detector.name=timm/test_efficientnet",
    "--model.detector.weights_backbone=null",
    "--model.detector.min_size=128",
    "--model.detector.max_size=160",
    "--model.detector.fpn_channels=16",
    "--model.detector.box_head_size=32",
    "--model.detector.rois_per_image=16",
    "--model.detector.score_threshold=0.0",
    "--model.detector.detections_per_image=36",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.limit_val_batches=10",
]


def field(path: str, name: str) -> float:
    """A line of a file in /proc, in MiB."""
    with contextlib.suppress(OSError), open(path) as lines:
        return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(name)), 0.0)
    return 0.0


def processes(pid: int, role: str = "main") -> Iterator[tuple[int, str]]:
    """A process and all below it, with what they are: ranks are started by main, workers by either."""
    yield pid, role
    children = Path(f"/proc/{pid}/task/{pid}/children")
    for child in map(int, children.read_text().split() if children.exists() else ()):
        with contextlib.suppress(OSError):  # it has ended
            is_rank = role == "main" and b"\0LOCAL_RANK=1" in Path(f"/proc/{child}/environ").read_bytes()
            yield from processes(child, "rank 1" if is_rank else f"{role}'s worker")


def measured(name: str, *command: str, until: Callable[[], bool] | None = None, log: Path) -> None:
    """Run a command, and print a row of the table. ``until`` something is there: then it is killed."""
    start = time.perf_counter()
    peaks: dict[str, tuple[float, float]] = {}
    with open(log, "ab") as output:
        output.write(f"\n# {name}: {' '.join(command)}\n".encode())
        output.flush()
        run = subprocess.Popen(command, stdout=output, stderr=output, cwd=REPOSITORY, start_new_session=True)
        while run.poll() is None:
            for pid, role in processes(run.pid):
                peak, own = peaks.get(role, (0.0, 0.0))
                peak = max(peak, field(f"/proc/{pid}/status", "VmRSS"))
                peaks[role] = peak, max(own, field(f"/proc/{pid}/smaps_rollup", "Private_Dirty"))
            if until is not None and until():
                os.killpg(run.pid, signal.SIGKILL)
            time.sleep(0.2)
    seconds = time.perf_counter() - start
    memory = "; ".join(f"{role} {peak:,.0f} ({own:,.0f})" for role, (peak, own) in peaks.items())
    failed = "" if run.returncode == 0 or until is not None else f" FAILED ({run.returncode}), see {log}"
    print(f"| {name}{failed} | {seconds:.0f} s | {memory} |", flush=True)


def read(what: str, root: Path) -> None:
    """Read train2017 in this process, and print seconds, MiB that stay, and MiB pickled."""
    from pycocotools.coco import COCO

    from detector.data.folder import DataFolder

    before, start = field("/proc/self/status", "VmRSS"), time.perf_counter()
    if what == "pycocotools":
        with contextlib.redirect_stdout(io.StringIO()):
            data = COCO(root / "annotations" / "instances_train2017.json")
    else:
        data = DataFolder(root).dataset("train2017", annotation_types=("masks",) if what == "masks" else ())
    seconds, stays = time.perf_counter() - start, field("/proc/self/status", "VmRSS") - before
    pickled = 0 if what == "pycocotools" else len(pickle.dumps(data)) / 2**20
    print(json.dumps({"s": seconds, "MiB": stays, "pickled": pickled}))


class Pixels(Dataset):
    """The same image files, read without annotations."""

    def __init__(self, files: list[Path]) -> None:
        self.names, self.folder = b"\0".join(os.fsencode(file.name) for file in files), files[0].parent

    def __getitem__(self, index: int) -> int:
        from detector.data.images import read_image

        return len(read_image(self.folder / os.fsdecode(self.names.split(b"\0")[index])))


class Owned(Dataset):
    """Gives what the worker that reads an image owns by then, in MiB."""

    def __init__(self, data: Dataset, images: int) -> None:
        self.data, self.images = data, images

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> float:
        self.data[index]
        last = index == self.images - 1
        return field("/proc/self/smaps_rollup", "Private_Dirty") if last else 0.0


def owned(what: str, root: Path, images: int) -> None:
    """Print what a forked worker owns after a pass over images."""
    from detector.data.folder import DataFolder

    data = DataFolder(root).dataset("train2017", annotation_types=("masks",) if what == "masks" else ())
    watched = Owned(Pixels(data.files()[:images]) if what == "pixels" else data, images)
    if what == "pixels":
        del data
    print(json.dumps(max(DataLoader(watched, batch_size=None, num_workers=1, multiprocessing_context="fork"))))


def results_of(*arguments: str) -> float | dict[str, float]:
    """Run this script with other arguments in a new process, and return what it prints."""
    done = subprocess.run([sys.executable, __file__, *arguments], cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def reading(root: Path, rounds: int, images: int) -> None:
    """Print what reading costs over pycocotools' ``COCO(file)`` in the same round."""
    print("| reading train2017 | over pycocotools' time | memory that stays | pickled |\n|---|---|---|---|")
    kinds = ("pycocotools", "boxes", "masks")
    done = [{what: results_of(str(root), "--read", what) for what in kinds} for _ in range(rounds)]
    for what in kinds:
        ratios = sorted(one[what]["s"] / one["pycocotools"]["s"] for one in done)
        times = sorted(one[what]["s"] for one in done)
        middle = f"{ratios[len(ratios) // 2]:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        seconds = f"{times[len(times) // 2]:.1f} s ({times[0]:.1f} to {times[-1]:.1f})"
        memory = " | ".join(f"{max(one[what][name] for one in done):,.0f} MiB" for name in ("MiB", "pickled"))
        print(f"| {what} | {seconds if what == 'pycocotools' else middle} | {memory} |")
    print(f"\n| a worker's own memory after {images:,} images | |\n|---|---|")
    for what in ("pixels", "boxes", "masks"):
        print(f"| {what} | {results_of(str(root), '--owned', what, '--images', str(images)):,.0f} MiB |")


def tools(root: Path, work: Path) -> None:
    """Run the tools, and print a row for each."""
    python, log, run = sys.executable, work / "log.txt", work / "run"
    # A val split of 200 images, to train with.
    content = json.loads((root / "annotations" / "instances_val2017.json").read_text())
    content["images"] = content["images"][:200]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] in kept]
    small = work / "data"
    (small / "annotations").mkdir(parents=True)
    (small / "annotations" / "instances_small.json").write_text(json.dumps(content))
    for name, place in {"small": "val2017", "train2017": "train2017", "val2017": "val2017"}.items():
        (small / name).symlink_to((root / place).resolve())
        file = root / "annotations" / f"instances_{name}.json"
        if file.exists():
            (small / "annotations" / file.name).symlink_to(file.resolve())
    train = [python, "tools/train.py", *TINY, f"--data.root={small}", "--data.val_split=small", f"--run_dir={run}"]
    annotations = str(root / "annotations" / "instances_train2017.json")
    print("\n| run | time | MiB resident at most, and own, by process |\n|---|---|---|")
    measured("check.py, the file alone", python, "tools/check.py", annotations, log=log)
    images = ("--images", str(root / "train2017"), "--quick")
    measured("check.py with the images' names", python, "tools/check.py", annotations, *images, log=log)
    browse = (python, "tools/browse.py", *TINY, f"--data.root={small}", "--data.val_split=small", "--output")
    measured("browse.py", *browse, str(work / "sheet.png"), log=log)
    steps = ("--trainer.max_steps=400", "--save_every=50")
    last = run / "checkpoints" / "last.ckpt"
    measured("train.py, killed after a checkpoint", *train, *steps, until=last.exists, log=log)
    measured("train.py resumes, to step 400", *train, *steps, "--ckpt_path=last", log=log)
    ranks = ("--trainer.max_steps=100", "--trainer.devices=2", "--trainer.strategy=ddp")
    measured("train.py, two ranks (gloo), 100 steps", *train[:-1], f"--run_dir={work / 'ranks'}", *ranks, log=log)
    checkpoint = ("--checkpoint", str(run))
    data = ("--root", str(root), "--split", "val2017")
    score = ("tools/eval.py", *checkpoint, *data, "--output", str(work / "scored"))
    measured("eval.py on 5,000 images, page and pictures", python, *score, log=log)
    found = ("--results", str(work / "scored" / "detections.json"))
    for evaluator in ("pycocotools", "faster-coco-eval"):
        again = ("tools/eval.py", *found, *data, "--evaluator", evaluator, "--output", str(work / evaluator))
        measured(f"eval.py --results of these, {evaluator}", python, *again, log=log)
    truth = ("--annotations", str(root / "annotations" / "instances_val2017.json"))
    predict = ("tools/predict.py", str(root / "val2017"), *checkpoint, *truth, "--output", str(work / "found"))
    measured("predict.py on 5,000 images", python, *predict, log=log)
    refine = ("tools/refine.py", *checkpoint, "--root", str(small), "--train_split", "train2017", "--split", "small")
    measured("refine.py, 50 steps", python, *refine, "--max_steps", "50", log=log)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="what coco_sized.py wrote")
    parser.add_argument("--output", type=Path, help="a new folder, for runs and logs; without it the tools do not run")
    parser.add_argument("--rounds", type=int, default=3, help="of reading; 0: no reading")
    parser.add_argument("--images", type=int, default=10_000, help="that a worker reads")
    parser.add_argument("--read", choices=("pycocotools", "boxes", "masks"), help=argparse.SUPPRESS)
    parser.add_argument("--owned", choices=("pixels", "boxes", "masks"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        read(options.read, options.root)
    elif options.owned:
        owned(options.owned, options.root, options.images)
    else:
        if options.rounds:
            reading(options.root.resolve(), options.rounds, options.images)
        if options.output:
            tools(options.root.resolve(), options.output.resolve())


if __name__ == "__main__":
    main()
