"""What can be fetched, from where, under which terms, and where it goes. Adding a data set is adding a row to DATA.

Weights of SAM and EfficientViT-SAM are not listed here: they are the rows of `evsam_lib.models.zoo.ZOO` that have a
checkpoint. Those of SAM3 and EfficientSAM3 are in SAM3_FILES, since their own table needs packages that fetching does
not. Folders of data are
those that params/paper and notebook 03 name, under data_root. A sum is given where independent public records agree on
it; the others are recorded on first use.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from evsam_lib.fetch.download import HUGGING_FACE, FetchError, Refused, ensure, part_of, record_of
from evsam_lib.fetch.unpack import BadArchive, marker_of, unpack
from evsam_lib.models.zoo import ZOO, Entry

__all__ = ["DATA", "Item", "Source", "choose", "fetch", "state", "weights"]

# The bucket behind images.cocodataset.org, whose own https certificate is for another name.
COCO_URL = "https://s3.amazonaws.com/images.cocodataset.org"
LVIS_URL = "https://dl.fbaipublicfiles.com/LVIS"
SA1B_URL = "https://ai.meta.com/datasets/segment-anything-downloads/"
SACO_URL = f"{HUGGING_FACE}/datasets/facebook/SACo-Gold"
SAV_URL = "https://ai.meta.com/datasets/segment-anything-video-downloads/"
BOXES_URL = f"{HUGGING_FACE}/mit-han-lab/efficientvit-sam/resolve/main/source_json_file"
# Sizes in bytes of released checkpoints: SAM's as public records have them, the others four bytes a parameter.
SIZES = {
    "sam_vit_b_01ec64.pth": 375_042_383,
    "sam_vit_l_0b3195.pth": 1_249_524_607,
    "sam_vit_h_4b8939.pth": 2_564_550_879,
    "mobile_sam.pt": 40_728_226,
}
ROUGH_SIZES = {f"efficientvit_sam_{v}.pt": mb * 10**6 for v, mb in zip(("l0", "l1", "l2"), (139, 191, 245))}
ROUGH_SIZES |= {"efficientvit_sam_xl0.pt": 468 * 10**6, "efficientvit_sam_xl1.pt": 814 * 10**6}


@dataclass(frozen=True)
class Item:
    """One file to download.

    Attributes:
        url: its address; its name is the last part.
        folder: where it goes, under the root of its kind.
        sha256: the public sum, or None.
        size: in bytes, exactly, or None.
        rough_size: in bytes, for people, where the exact one is not known.
        gate: page of a repository whose owners admit people one by one; None where everybody gets the file.
        members: for an archive, the pattern of the files to unpack; None leaves the file as it is.
        makes: pattern under `folder` of what is there afterwards, for an archive.
        count: how many files that must be.
    """

    url: str
    folder: str = ""
    sha256: str | None = None
    size: int | None = None
    rough_size: int | None = None
    gate: str | None = None
    members: str | None = None
    makes: str | None = None
    count: int = 1

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Source:
    """Something one asks for by name.

    Attributes:
        purpose: what needs it.
        licence: in a few words.
        items: its files.
        by_hand: what to do instead, where terms must be accepted first.
    """

    purpose: str
    licence: str
    items: tuple[Item, ...]
    by_hand: str | None = None


_COCO_LICENCE = "CC BY 4.0; images: Flickr terms"
_VAL2017 = Item(
    f"{COCO_URL}/zips/val2017.zip",
    "coco",
    sha256="4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
    size=815_585_330,
    members="val2017/*.jpg",
    makes="val2017/*.jpg",
    count=5000,
)
_TRAIN2017 = Item(
    f"{COCO_URL}/zips/train2017.zip",
    "coco",
    sha256="69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
    size=19_336_861_798,
    members="train2017/*.jpg",
    makes="train2017/*.jpg",
    count=118_287,
)
_INSTANCES = Item(
    f"{COCO_URL}/annotations/annotations_trainval2017.zip",
    "coco",
    sha256="113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
    size=252_907_541,
    members="annotations/instances_val2017.json",
    makes="annotations/instances_val2017.json",
)
_LVIS = Item(  # public records disagree on its sum
    f"{LVIS_URL}/lvis_v1_val.json.zip",
    "coco/annotations",
    rough_size=192 * 10**6,
    members="lvis_v1_val.json",
    makes="lvis_v1_val.json",
)
_SGINW = Item(  # as SAM-HQ's authors give it out: seginw/<one of 25>/valid/*.jpg and its annotations
    f"{HUGGING_FACE}/sam-hq-team/SegInW/resolve/main/seginw.zip",
    members="seginw/*/valid/*",
    makes="seginw/*/valid/_annotations_min1cat.coco.json",
    count=25,
)
_COCO_VITDET = "ba17f9fb28832baf5573e8a4212cad7740d606dd95b9c6d13c5465f603627813"

DATA: dict[str, Source] = {
    "coco": Source("Tables 2-5, COCO", _COCO_LICENCE, (_VAL2017, _INSTANCES)),
    "coco-boxes": Source(
        "Tables 4 and 5, COCO: detectors' boxes",
        "Apache-2.0",
        (
            Item(f"{BOXES_URL}/coco_vitdet.json", "coco/source_json_file", sha256=_COCO_VITDET),
            Item(f"{BOXES_URL}/coco_yolov8.json", "coco/source_json_file"),
            Item(f"{BOXES_URL}/coco_groundingdino.json", "coco/source_json_file"),
        ),
    ),
    # Of LVIS val's 19,809 images all but those of val2017 lie in train2017.
    "lvis": Source("Tables 2-4, LVIS", _COCO_LICENCE, (_LVIS, _VAL2017, _TRAIN2017)),
    "lvis-boxes": Source(
        "Table 4, LVIS: ViTDet's boxes",
        "Apache-2.0",
        (Item(f"{BOXES_URL}/lvis_vitdet.json", "coco/source_json_file"),),
    ),
    "sginw": Source("Section 4.4, SGinW", "each of the 25 sets its own", (_SGINW,)),
    "sa1b": Source(
        "training, notebooks 03-05",
        "Meta's SA-1B research licence",
        (Item(SA1B_URL, "sa1b", members="", makes="**/sa_*.jpg"),),
        by_hand=f"Meta gives SA-1B to those who accept its licence: do so at {SA1B_URL}, download as many of the "
        "archives sa_*.tar as you want (about 11,000 images and 10 GB each) and unpack them into {folder}",
    ),
    "saco-gold": Source(
        "SA-Co Gold, notebook 19",
        "its own, see the page; images: MetaCLIP's and SA-1B's",
        (Item(SACO_URL, "saco_gold", members="", makes="gold_*_merged_[abc]_release_test.json", count=21),),
        by_hand="SA-Co Gold is given out after a form and its images lie elsewhere: put the 21 files "
        f"gold_*_merged_*_release_test.json of {SACO_URL} and the folders of images that they name (how to get them: "
        "github.com/facebookresearch/sam3, scripts/eval/gold) into {folder}",
    ),
    "sa-v": Source(
        "video, notebook 18",
        "CC BY 4.0",
        (Item(SAV_URL, "sa_v", members="", makes="*/JPEGImages_24fps/*/00000.jpg"),),
        by_hand=f"Meta gives SA-V to those who accept its licence: do so at {SAV_URL}, download sa_v_val.tar and "
        "sa_v_test.tar (frames and masks of 155 and 150 videos) and unpack them into {folder}",
    ),
}

EFFICIENTSAM3_URL = f"{HUGGING_FACE}/Simon7108528/EfficientSAM3"
SAM3_PAGE = f"{HUGGING_FACE}/facebook/sam3"
_TERMS = "Apache-2.0, in parts the SAM License"
# name -> file and folder of the repository
SAM3_FILES: dict[str, tuple[str, str]] = {
    f"ES-{short}-{size}": (f"efficient_sam3_{family}_{size.lower()}.pt", "stage1_all_converted")
    for family, short in (("efficientvit", "EV"), ("repvit", "RV"), ("tinyvit", "TV"))
    for size in "SML"
}
SAM3_FILES |= {
    f"{name}-geometry": (SAM3_FILES[name][0].replace(".pt", "_geo_ft.pt"), "stage1_all_converted")
    for name in ("ES-EV-M", "ES-RV-M", "ES-TV-M")
}
SAM3_FILES |= {
    f"LiteText-{size}": (f"efficient_sam3_image_encoder_{text}_ctx16.pt", "sam3_litetext")
    for size, text in (("S", "mobileclip_s0"), ("M", "mobileclip_s1"), ("L", "mobileclip2_l"))
}


def weights() -> dict[str, Source]:
    """The zoo's models that have a released checkpoint, then SAM3 and EfficientSAM3, by name."""
    found = {name: Source("", entry.licence, (_checkpoint(entry),)) for name, entry in ZOO.items() if entry.checkpoint}
    for name, (file, folder) in SAM3_FILES.items():
        found[name] = Source("", _TERMS, (Item(f"{EFFICIENTSAM3_URL}/resolve/main/{folder}/{file}"),))
    sam3 = Item(f"{SAM3_PAGE}/resolve/main/sam3.pt", rough_size=3_450 * 10**6, gate=SAM3_PAGE)
    return found | {"SAM3": Source("", "SAM License", (sam3,))}


def _checkpoint(entry: Entry) -> Item:
    name = entry.file_name
    return Item(entry.checkpoint, sha256=entry.sha256, size=SIZES.get(name), rough_size=ROUGH_SIZES.get(name))


def choose(names: Iterable[str], sources: dict[str, Source]) -> dict[str, Source]:
    """The named sources, in the order of the names; "all" stands for all that need nobody's consent.

    Raises:
        ValueError: there is no such source; names the nearest.
    """
    chosen = {}
    for name in names:
        if name == "all":
            chosen |= {key: source for key, source in sources.items() if not _asks(source)}
        elif name in sources:
            chosen[name] = sources[name]
        else:
            near = difflib.get_close_matches(name, sources, n=3, cutoff=0.5) or sources
            own = " It has no released checkpoint." if name in ZOO else ""
            raise ValueError(f"unknown name {name!r}.{own} The nearest are {', '.join(near)}.")
    return chosen


def _asks(source: Source) -> bool:
    return source.by_hand is not None or any(item.gate for item in source.items)


def fetch(source: Source, root: Path, *, keep_archive: bool = False, say=print) -> bool:
    """Fetches what is not there yet; returns whether that was anything.

    Args:
        source: what.
        root: of the weights or of the data.
        keep_archive: leave archives in place when they are unpacked.
        say: takes lines of progress.

    Raises:
        FetchError: it cannot be had.
    """
    if source.by_hand and any(state(item, root) != "present" for item in source.items):
        raise FetchError(source.by_hand.format(folder=root / source.items[0].folder))
    fetched = [_fetch_item(item, root, keep_archive, say) for item in source.items]
    return any(fetched)


def _fetch_item(item: Item, root: Path, keep_archive: bool, say) -> bool:
    path = root / item.folder / item.name
    if item.gate:
        return _ensure_gated(item, path, say)
    if item.members is None:
        return ensure(item.url, path, sha256=item.sha256, size=item.size, say=say)
    if state(item, root) == "present":
        say(f"{root / item.folder / item.makes}: already there")
        return False
    ensure(item.url, path, sha256=item.sha256, size=item.size, room=2.0, say=say)  # photographs hardly shrink
    try:
        unpack(path, path.parent, members=item.members, say=say)
    except BadArchive:
        if item.sha256 is None:  # else it is as its makers want it
            path.unlink()
            record_of(path).unlink(missing_ok=True)
        raise
    if state(item, root) != "present":
        raise FetchError(f"{path} is unpacked, but {path.parent / item.makes} are not the {item.count} files expected")
    if not keep_archive:
        path.unlink()
    return True


def _ensure_gated(item: Item, path: Path, say) -> bool:
    """With the user's own token, as huggingface_hub keeps it: $HF_TOKEN, or that of `hf auth login`."""
    from huggingface_hub import get_token

    token = get_token()
    try:
        return ensure(item.url, path, sha256=item.sha256, size=item.size, token=token, say=say)
    except Refused as error:
        way = (
            f"wait for the answer to your request at {item.gate}"
            if token
            else (f"ask for access at {item.gate}, then set HF_TOKEN or run `hf auth login`")
        )
        who = "the account of this token" if token else "nobody without a token"
        raise FetchError(f"{path.name} is given to those whom its owners admit, and {who} is: {way}") from error


def state(item: Item, root: Path) -> str:
    """ "present", "partial" or "absent": by names, counts and sizes; nothing is read, no network asked."""
    path = root / item.folder / item.name
    if item.members is None:
        if path.is_file():
            return "present" if item.size in (None, path.stat().st_size) else "partial"
        return "partial" if part_of(path).is_file() else "absent"
    found = len(list(islice((root / item.folder).glob(item.makes), item.count)))
    if found == item.count and not marker_of(path).exists():
        return "present"
    return "partial" if found or path.is_file() or part_of(path).is_file() else "absent"
