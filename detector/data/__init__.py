"""Data sets in COCO's format: read, checked, batched, drawn, and the results that are scored against them."""
