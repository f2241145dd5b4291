"""What a notebook records: whole or not at all, with its origin."""

import json

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from evsam_lib.data.generate import scene
from evsam_lib.study import begin, build_report
from evsam_lib.study.paths import work_folder
from evsam_lib.study.picture import labels
from evsam_lib.study.tables import read_table


@pytest.fixture
def opened(tmp_path):
    def open_(name="09_test", **options):
        return begin(name, results_root=str(tmp_path / "results"), data_root=str(tmp_path), **options)

    return open_


def folder(tmp_path, name="09_test", profile="mini"):
    return tmp_path / "results" / profile / name


class TestSave:
    def test_writes_table_metrics_and_origin(self, opened, tmp_path):
        study = opened(seed=7, steps=3)
        study.table("own", {"a": {"x": 1, "y": 2.5}}, unit={"x": "px"}, n=4)
        study.metric("train_s", 1.5)
        study.save()
        table = read_table(folder(tmp_path))
        assert table[["row", "column", "value", "unit", "status"]].to_numpy().tolist() == [
            ["a", "x", 1.0, "px", "generated data"],
            ["a", "y", 2.5, "", "generated data"],
        ]
        metrics = json.loads((folder(tmp_path) / "metrics.json").read_text())
        assert metrics["train_s"] == 1.5
        origin = json.loads((folder(tmp_path) / "provenance.json").read_text())
        assert origin["parameters"]["steps"] == 3
        assert origin["seed"] == 7
        assert {"git", "versions", "machine", "started", "finished", "inputs", "gpu"} <= origin.keys()

    def test_a_new_run_replaces_the_whole_result(self, opened, tmp_path):
        first = opened()
        first.file("old.txt").write_text("old")
        first.save()
        second = opened()
        second.file("new.txt").write_text("new")
        second.save()
        assert (folder(tmp_path) / "new.txt").is_file()
        assert not (folder(tmp_path) / "old.txt").exists()

    def test_a_crash_before_save_leaves_the_last_good_result(self, opened, tmp_path):
        study = opened()
        study.table("own", {"a": {"x": 1}})
        study.save()
        broken = opened()
        broken.table("own", {"a": {"x": 2}})
        broken.file("promised.txt")  # never written
        with pytest.raises(FileNotFoundError, match=r"promised\.txt"):
            broken.save()
        assert read_table(folder(tmp_path)).value.tolist() == [1.0]

    @pytest.mark.parametrize("renames", [0, 1])
    def test_a_crash_while_publishing_leaves_a_whole_result(self, opened, tmp_path, monkeypatch, renames):
        study = opened()
        study.table("own", {"a": {"x": 1}})
        study.save()
        monkeypatch.setattr(
            "evsam_lib.study.record.publish", lambda ready, folder: _crash_after(renames, ready, folder)
        )
        study.table("own", {"a": {"x": 2}})
        with pytest.raises(KeyboardInterrupt):
            study.save()
        opened()  # a new start finds what a crash left
        assert read_table(folder(tmp_path)).value.tolist() == [1.0]

    def test_a_cell_run_twice_counts_once(self, opened, tmp_path):
        study = opened()
        study.table("own", {"a": {"x": 1}})
        study.table("own", {"a": {"x": 2}})
        study.save()
        study.save()
        assert read_table(folder(tmp_path)).value.tolist() == [2.0]

    def test_figure_is_kept(self, opened, tmp_path):
        study = opened()
        fig, ax = plt.subplots()
        ax.set_title("It rises")
        study.figure(fig, "rise")
        study.save()
        kept = folder(tmp_path) / "figures" / "rise.png"
        assert kept.stat().st_size > 1000 and labels(kept)["Title"] == "It rises"
        assert not plt.fignum_exists(fig.number)

    def test_figure_with_a_photograph_is_a_small_jpeg_with_the_same_labels(self, opened, tmp_path):
        study = opened()
        fig, ax = plt.subplots()
        ax.imshow(scene(0, 0, size=(384, 512)).image)
        study.figure(fig, "view", title="Größe × 2", caption="A scene.")
        study.save()
        kept = folder(tmp_path) / "figures" / "view.jpg"
        assert kept.stat().st_size < 150_000
        assert labels(kept) == {"Title": "Größe × 2", "Description": "A scene.", "Order": "0"}

    def test_figure_is_named_by_its_title_wherever_that_stands(self, opened, tmp_path):
        study = opened()
        fig, ax = plt.subplots()
        ax.set_title("It falls", loc="left")
        study.figure(fig, "fall")
        study.save()
        assert labels(folder(tmp_path) / "figures" / "fall.png")["Title"] == "It falls"

    def test_later_notebooks_read_it(self, opened):
        first = opened("04_first")
        first.metric("l2", 0.25)
        first.file("weights.bin").write_bytes(b"w")
        first.save()
        result = opened("05_second").result("04_first")
        assert result.metrics["l2"] == 0.25
        assert result.file("weights.bin").read_bytes() == b"w"
        with pytest.raises(FileNotFoundError, match=r"holds no other\.bin; it holds .*weights\.bin"):
            result.file("other.bin")

    def test_comparison_covers_the_claimed_cells(self, opened):
        study = opened("09_table3_gt_boxes")
        study.table("table3", {"EfficientViT-SAM-mini": {"COCO mIoU": 50.0}}, unit="%")
        comparison = study.save()
        assert (comparison.table == "table3").all()
        assert len(comparison) == 16
        assert (comparison.verdict == "generated data").any()


def test_only_long_evaluations_are_taken_up_again(opened, tmp_path):
    row = {"model": "edge-sam", "weights": "official", "label": "distilled, trained"}
    assert opened().resumable("COCO", "gt-box", **row) == {}
    study, folder = opened(profile="paper"), tmp_path / "results/paper/evaluations"
    assert study.resumable("COCO", "gt-box", **row) == {"out": folder / "coco-gt-box-edge-sam.json", "resume": True}
    own = study.resumable("lvis", "points", **row | {"weights": "05/student.safetensors"}, limit=9)
    assert own["out"] == folder / "lvis-points-distilled_trained-9.json"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("provenance.json", '{"run_id": "\\ud800"}'),  # half a letter, which could not be written again
        ("provenance.json", "{}"),
        ("metrics.json", "{"),
        ("table.csv", "table,row\nx,y\n"),
        ("run.ipynb", "{}"),
        ("figures/rise.png", "no picture"),
    ],
)
def test_a_damaged_result_is_named(opened, tmp_path, file, content):
    study = opened("01_one")
    study.table("own", {"a": {"x": 1}})
    study.save()
    place = folder(tmp_path, "01_one") / file
    place.parent.mkdir(exist_ok=True)
    place.write_text(content)
    with pytest.raises(ValueError, match=rf"{place.name} is damaged \(.*\): run that notebook again"):
        opened("02_two").result("01_one") if file in ("metrics.json", "table.csv") else build_report(
            tmp_path / "results"
        )


class TestRefusals:
    def test_missing_data_says_what_to_get(self, opened, tmp_path):
        with pytest.raises(FileNotFoundError, match="get COCO and put it there"):
            opened(needs={tmp_path / "coco": "get COCO and put it there"})

    def test_missing_package(self, opened):
        with pytest.raises(ModuleNotFoundError, match="needs the package no_such_package: pip install it"):
            opened(needs={"no_such_package": "pip install it"})

    def test_missing_result_names_the_command(self, opened):
        with pytest.raises(FileNotFoundError, match=r"evsam_lib\.run --profile mini 04"):
            opened().result("04_distill_encoder")

    @pytest.mark.parametrize("device", ["gpu", "cuda:x", "tpu"])
    def test_device(self, opened, device):
        with pytest.raises(ValueError, match=device):
            opened(device=device)

    def test_name(self, opened):
        with pytest.raises(ValueError, match="'test'"):
            opened("test")

    def test_status(self, opened):
        with pytest.raises(ValueError, match="'guessed'"):
            opened().table("own", {"a": {"x": 1}}, status="guessed")

    def test_value(self, opened):
        with pytest.raises(ValueError, match="must be a number, got 'many'"):
            opened().table("own", {"a": {"x": "many"}})


class TestReport:
    def test_gathers_what_there_is(self, opened, tmp_path):
        study = opened("01_architecture")
        study.table("table1", {"EfficientViT-SAM-L0": {"params": 34.792784}}, unit="M", status="computed")
        assert study.table("own", {"a": {"x": 13.4567}}, unit="ms", spread=1024.2).columns.name == "ms"
        study.save()
        text = build_report(tmp_path / "results", "mini").read_text()
        assert text.startswith("# EfficientViT-SAM and EfficientSAM3: results of this study\n\n**Profile `mini`")
        assert "| EfficientViT-SAM-L0" in text
        assert "1 match" in text
        assert "not run: " in text
        assert "13.46 ± 1000" in text

    def test_figures_stand_in_the_order_they_were_made_with_their_captions(self, opened, tmp_path):
        study = opened()
        for name in ("second_letter", "a_letter"):
            fig, ax = plt.subplots()
            ax.set_title(f"Finding of {name}")
            study.figure(fig, name, caption=f"Conditions of {name} – 3 × 3.")
        study.save()
        text = build_report(tmp_path / "results", "mini").read_text()
        first = text.index("![Finding of second_letter](09_test/figures/second_letter.png)")
        assert first < text.index("Conditions of second_letter – 3 × 3.") < text.index("a_letter.png")

    def test_both_families_stand_side_by_side(self, opened, tmp_path):
        study = opened("01_architecture")
        counts = {"params, whole model": 34.8, "MACs, encoder": 35.0, "MACs, with decoder": 36.0}
        study.table("counts", {"efficientvit-sam-l0": counts, "sam-vit-b": counts}, unit="G", status="computed")
        study.save()
        study = opened("16_efficientsam3_compute")
        parts = {
            "backbone": 2.0,
            "head": 10.0,
            "neck": 100.0,
            "detector": 330.0,
            "tracker neck": 93.0,
            "click decoder": 3.0,
        }
        study.table("ledger", {"ES-EV-S": parts}, unit="G", status="computed")
        study.table("parameters", {"ES-EV-S": {"detector": 93.2}}, unit="M", status="computed")
        study.table("seconds", {"ES-EV-S, 504 px": {"image": 1500.0, "phrase": 2000.0}}, unit="ms", status="measured")
        study.save()
        assert "# EfficientSAM3 beside" in build_report(tmp_path / "results", "mini").read_text()
        study = opened("18_efficientsam3_memory")
        study.metric("gain_j_and_f_points", 4.25)
        study.save()
        text = build_report(tmp_path / "results", "mini").read_text()
        section = text[text.index("# EfficientSAM3 beside") : text.index("# What the notebooks found")]
        lines = {line.split("|")[1].strip(): line for line in section.splitlines() if line.startswith("|")}
        row = [cell.strip() for cell in lines["ES-EV-S"].split("|")[2:-1]]
        assert row == ["93.2", "105", "3", "112", "218", "61.62"]  # image for boxes: backbone, head, tracker's neck
        assert "sam-vit-b" not in lines  # has no row in the paper
        assert "ES-EV-S, encodes an image at 105 GMACs, 3.0 times EfficientViT-SAM-L0's 35" in text
        assert [cell.strip() for cell in lines["ES-EV-S, 504 px"].split("|")[2:-1]] == ["1.5", "2"]
        assert (
            "66.3 % (ES-EV-L), against 79.9 % of EfficientViT-SAM-XL1" not in text
        )  # of the students that were counted
        assert "61.62 % (ES-EV-S), against 79.9 % of EfficientViT-SAM-XL1" in text
        assert "stage 2, memory" in text and "4.25" in text
        assert text.index("# EfficientSAM3 beside") < text.index("# What the notebooks found")

    def test_no_results(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"evsam_lib\.run --profile paper"):
            build_report(tmp_path, "paper")


def _crash_after(renames, ready, folder):
    """What `publish` does, cut off before its first or its second rename."""
    if renames:
        folder.rename(work_folder(folder, "old"))
    raise KeyboardInterrupt


def test_long_rows_carry_their_own_unit_and_status(opened):
    study = opened()
    wide = study.table("own", [{"row": "a", "column": "x", "value": 3, "unit": "s", "status": "not run: no GPU"}])
    assert isinstance(wide, pd.DataFrame)
    assert wide.loc["a", "x"] == 3
