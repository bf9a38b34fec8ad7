"""Draw the README's picture: a box that slides onto an object because the crop passes a gradient to the box.

    python .github/assets/slide.py data/digits 9

That folder is written by configs/quickstart.yaml; 9 is the place of the image in its val split.
"""

import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms import v2

from detector import affine_crop
from detector.data.dataset import CocoDetection

SCALE = 3
STEPS = (0, 10, 20, 40, 150)
COLORS = ("#D55E00", "#E69F00", "#F0E442", "#56B4E9", "#009E73")

folder = Path(sys.argv[1])
data = CocoDetection(folder / "val", folder / "annotations" / "instances_val.json")
index = int(sys.argv[2])
image, target = data[index]
sizes = (target["boxes"][:, 2:] - target["boxes"][:, :2]).prod(dim=1)
truth = target["boxes"][sizes.argmax()]
width, height = truth[2] - truth[0], truth[3] - truth[1]


def crop(box: torch.Tensor) -> torch.Tensor:
    return affine_crop(image[None], [box[None]], (48, 40), sampling_ratio=2, aligned=True)[0]


wanted = crop(truth)
box = (truth + torch.stack([0.3 * width, -0.25 * height, 0.15 * width, -0.3 * height])).requires_grad_()
optimizer = torch.optim.Adam([box], lr=0.7)
boxes = []
for step in range(STEPS[-1] + 1):
    boxes.append(box.detach().clone())
    blur = max(8.0 * (1 - step / 100), 0.3)  # from coarse to fine: far off, only blurred crops look alike
    difference = v2.functional.gaussian_blur(crop(box) - wanted, [31, 31], [blur, blur])
    optimizer.zero_grad()
    difference.square().mean().backward()
    optimizer.step()
error = (boxes[-1] - truth).abs().max().item()
print(
    f"image {int(target['image_id'])}: off by {(boxes[0] - truth).abs().max():.1f} px, "
    f"after {STEPS[-1]} steps by {error:.3f} px"
)

picture = v2.functional.to_pil_image(image)
picture = picture.resize((picture.width * SCALE, picture.height * SCALE), Image.Resampling.BICUBIC)
font = ImageFont.load_default(15)
cell = (40 * SCALE, 48 * SCALE)
columns = len(STEPS) + 1
canvas = Image.new(
    "RGB", (picture.width + 24 + 2 * (cell[0] + 12), max(picture.height, 3 * (cell[1] + 30)) + 16), "white"
)
canvas.paste(picture, (8, 8))
pen = ImageDraw.Draw(canvas)
for step, color in zip(STEPS, COLORS):
    pen.rectangle([8 + SCALE * c for c in boxes[step].tolist()], outline=color, width=3)
captions = [f"step {step}" for step in STEPS] + ["wanted"]
crops = [crop(boxes[step]) for step in STEPS] + [wanted]
for i, (caption, part) in enumerate(zip(captions, crops)):
    left, top = picture.width + 24 + (i % 2) * (cell[0] + 12), 8 + (i // 2) * (cell[1] + 30)
    pen.text((left, top), caption, "black", font)
    small = v2.functional.to_pil_image(part.detach().clamp(0, 1)).resize(cell, Image.Resampling.BICUBIC)
    canvas.paste(small, (left, top + 20))
    pen.rectangle(
        (left - 2, top + 18, left + cell[0] + 1, top + 21 + cell[1]), outline=(*COLORS, "#000000")[i], width=3
    )
canvas.quantize(256).save(Path(__file__).with_name("slide.png"), optimize=True)
