"""A truth and results to be scored."""

from detector.data.annotations import index_coco


def truth(boxes, *, crowd=()):
    annotations = [
        {
            "id": number,
            "image_id": image,
            "category_id": category,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": int(number in crowd),
        }
        for number, (image, category, box) in enumerate(boxes, start=1)
    ]
    images = [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 100} for i in (1, 2)]
    return index_coco({"images": images, "annotations": annotations, "categories": [{"id": 5, "name": "a"}]})


def result(image, box, score=0.9):
    return {"image_id": image, "category_id": 5, "bbox": box, "score": score}
