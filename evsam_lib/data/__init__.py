"""What is read: generated scenes, SA-1B folders, COCO and LVIS annotations, and the geometry of model inputs.

Import the modules by name; `generate` needs numpy only, `sa1b` and `coco` also Pillow and pycocotools.
"""
