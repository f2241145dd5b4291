"""The study for those who outgrow one machine: what must run again, in which order, and where.

    make workflow ARGS=-n                                   what would run, and why
    make workflow ARGS="--cores 2"                          the mini profile, two notebooks at a time
    make workflow ARGS="--cores 16 --resources gpu=8 --config study=paper gpus=8"

A rule per notebook, which calls the study's own runner. With GPUs also a job per table, data set and released model,
which evaluates on all GPUs of a node and whose result the notebook then finds. Rules only name files; what is done
stands in notebooks and library. Snakemake lives in an environment of its own, since it holds packages of the study back;
config `python` names the study's interpreter where it is not .venv's.
"""

import json
from pathlib import Path

import yaml

STUDY = config.get("study", "mini")
GPUS = int(config.get("gpus", 0))  # of a node
PYTHON = config.get("python", ".venv/bin/python" if Path(".venv/bin/python").exists() else "python")
COCO = config.get("coco", "data/coco")  # with LVIS's annotations and the detectors' boxes in it
RESULTS = f"results/{STUDY}"

# What a notebook evaluates: the prompt, and the data sets or, for a detector's boxes, the stems of their files.
TABLES = {
    "08_table2_points": ("points", ["coco", "lvis"]),
    "09_table3_gt_boxes": ("gt-box", ["coco", "lvis"]),
    "10_table4_vitdet_boxes": ("detector-box", ["coco_vitdet", "lvis_vitdet"]),
    "11_table5_detectors": ("detector-box", ["coco_yolov8", "coco_groundingdino"]),
}
DATASETS = {
    "coco": f"--images {COCO}/val2017 --annotations {COCO}/annotations/instances_val2017.json",
    "lvis": f"--dataset lvis --images {COCO} --annotations {COCO}/annotations/lvis_v1_val.json",
}
NOTEBOOKS = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))["metadata"].get("evsam", {}).get("needs", [])
    for path in sorted(Path("notebooks").glob("[0-9][0-9]_*.ipynb"))
}
LIBRARY = sorted(str(path) for path in Path("evsam_lib").rglob("*.py"))


def needs(name):
    """The notebooks whose results this one reads; * is all others."""
    return [other for other in NOTEBOOKS if other != name] if "*" in NOTEBOOKS[name] else NOTEBOOKS[name]


def parameter_files(name):
    """The files that set a notebook's parameters in this profile."""
    files = Path(f"params/{STUDY}.yaml"), Path(f"params/{STUDY}/{name}.yaml"), Path("params/local.yaml")
    return [str(path) for path in files if path.exists()]


def evaluations(name):
    """What a notebook finds evaluated: its released models, where there are GPUs to do it on."""
    if name not in TABLES or not GPUS:
        return []
    given = {}
    for path in parameter_files(name):
        given |= yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    rows = list(zip(given.get("models", []), given.get("weights", [])))
    if "student" in given:
        rows = [(given["student"], weights) for weights in given["weights"]]
        rows.append((given["teacher"], given["teacher_weights"]))
    models = [model for model, weights in rows if weights == "official"]
    prompt, sources = TABLES[name]
    return expand(f"{RESULTS}/evaluations/{{source}}-{prompt}-{{model}}.json", source=sources, model=models)


def how(wildcards):
    """The options of an evaluation: data set, and what belongs to the prompt."""
    dataset, _, detector = wildcards.source.partition("_")
    boxes = f" --detections {COCO}/source_json_file/{wildcards.source}.json" if detector else ""
    clicks = " --clicks 5" if wildcards.prompt == "points" else ""
    return DATASETS[dataset] + boxes + clicks


rule all:
    input:
        expand(f"{RESULTS}/{{notebook}}/metrics.json", notebook=NOTEBOOKS),


for notebook in NOTEBOOKS:

    rule:
        name:
            f"notebook_{notebook}"
        input:
            f"notebooks/{notebook}.ipynb",
            LIBRARY,
            parameter_files(notebook),
            evaluations(notebook),
            expand(f"{RESULTS}/{{need}}/metrics.json", need=needs(notebook)),
        output:
            update(f"{RESULTS}/{notebook}/metrics.json"),  # a run that fails leaves the last good result
        params:
            name=notebook,
        threads: 2
        resources:
            gpu=min(GPUS, 1),
        shell:
            "{PYTHON} -m evsam_lib.run --profile {STUDY} {params.name}"


rule evaluate:
    output:
        f"{RESULTS}/evaluations/{{source}}-{{prompt}}-{{model}}.json",
    wildcard_constraints:
        source="|".join(source for _, sources in TABLES.values() for source in sources),
        prompt="|".join(prompt for prompt, _ in TABLES.values()),
    params:
        how=how,
    threads: 2 * max(GPUS, 1)
    resources:
        gpu=GPUS,
        tasks=0,  # one launcher on a node: torchrun starts the processes, not the cluster
    shell:
        "{PYTHON} -m torch.distributed.run --standalone --nproc_per_node {GPUS} -m evsam_lib.evaluate"
        " --model {wildcards.model} --weights official --device cuda --prompt {wildcards.prompt} {params.how}"
        " --out {output} --resume --keep-part"
