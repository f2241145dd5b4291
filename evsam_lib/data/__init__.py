"""What is read: generated scenes, SA-1B, COCO, LVIS, SGinW, detectors' boxes, and the geometry of model inputs.

Import the modules by name; `generate` needs numpy only, the loaders also Pillow and pycocotools. `check` says what is
missing or broken in a folder: `python -m evsam_lib.data.check`.
"""
