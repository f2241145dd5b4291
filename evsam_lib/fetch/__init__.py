"""Released weights and public data sets, brought to where `load_model` and the paper profile look for them.

    python -m evsam_lib.fetch weights efficientvit-sam-xl1 sam-vit-h
    python -m evsam_lib.fetch data coco
    python -m evsam_lib.fetch --list

`catalog` says what there is, `download` brings one file, `unpack` opens archives, `__main__` is the command line.
Nothing here reads what is inside a weight file. Notebook 00_start_here says what each profile needs.
"""
