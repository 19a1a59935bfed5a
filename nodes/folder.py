"""Training Dataset from Folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from comfy_api.latest import io

from ..core.errors import AdapterLabError
from ..core.train.buckets import Buckets
from ..core.train.captions import LINES, MISSING, CaptionConfig
from ..core.train.folder import listing
from .host import paths
from .types import CATEGORY, TrainDatasetType, panel, report_output

if TYPE_CHECKING:
    from .host.folder import FolderJob


def _count(name: str, default: int, least: int, most: int, tooltip: str) -> io.Input:
    return io.Int.Input(name, default=default, min=least, max=most, tooltip=tooltip,
                        advanced=True)  # fmt: skip


def _text(name: str, default: str, tooltip: str) -> io.Input:
    return io.String.Input(name, default=default, tooltip=tooltip, advanced=True)


def _share(name: str, tooltip: str) -> io.Input:
    return io.Float.Input(name, default=0.0, min=0.0, max=1.0, step=0.01, tooltip=tooltip,
                          advanced=True)  # fmt: skip


def _switch(name: str, default: bool, tooltip: str) -> io.Input:
    return io.Boolean.Input(name, default=default, tooltip=tooltip, advanced=True)


def _choice(name: str, options: tuple[str, ...], tooltip: str) -> io.Input:
    return io.Combo.Input(name, options=list(options), default=options[0], tooltip=tooltip,
                          advanced=True)  # fmt: skip


def _usual() -> list[io.Input]:
    return [
        io.Vae.Input("vae", tooltip="The VAE that belongs to the model."),
        io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
        io.String.Input("folder", default="", tooltip="Folder with pictures or videos and a .txt "
                        "of the same name beside each: a full path, or one below ComfyUI's input "
                        "folder."),
        io.String.Input("name", default="", tooltip="Name of the dataset in "
                        "output/adapter_lab/datasets, for Load Training Dataset. Empty: it is not "
                        "saved, only what was encoded is kept."),
        io.Int.Input("resolution", default=1024, min=16, max=16384, step=8, tooltip="Pictures get "
                     "about the area of a square with this side, in pixels."),
        io.Boolean.Input("flip", default=False, tooltip="Also learn each picture mirrored. Not "
                         "for what has a left and a right: text, faces of one person."),
        io.Combo.Input("missing_captions", options=list(MISSING), default=MISSING[0],
                       tooltip="What a picture without caption file gets. An empty file "
                       "is an empty caption."),
        io.String.Input("trigger", default="", tooltip="Word to call up what is learned: put in "
                        "place of [trigger] in captions, else in front of them; not in captions of "
                        "regularisation pictures. keep_tokens 1 keeps it in front."),
    ]  # fmt: skip


def _of_pictures() -> list[io.Input]:
    return [
        _count("bucket_step", 64, 1, 1024, "Sides are multiples of this many pixels."),
        _switch("buckets", True, "Keep the aspect of pictures. Off: all are cut to squares."),
        _switch("upscale", False, "Enlarge pictures that are smaller than the resolution."),
        _choice("masks", ("files", "files or alpha", "off"), "Where the loss counts: "
                "name.mask.png or name-mask.png beside the picture or name.png in a folder 'masks' "
                "(white counts), or what is not transparent."),
    ]  # fmt: skip


def _of_captions() -> list[io.Input]:
    return [
        _choice("caption_lines", LINES, "The first line of a caption file, all of them joined, or "
                "each as a caption of its own."),
        _text("caption_extension", "", "Ending of caption files. Empty: .txt, else .caption."),
        _text("prefix", "", "Put before every caption."),
        _text("suffix", "", "Put behind every caption."),
        _count("shuffles", 0, 0, 64, "How many orders of the tags of each caption to learn, each "
               "encoded once. 0: as they are."),
        _text("separator", ",", "What stands between tags."),
        _count("keep_tokens", 0, 0, 1000, "So many tags in front stay where they are; or those "
               "before ||| in the caption."),
        _share("tag_dropout", "Share of the tags that each shuffled order lacks."),
        _share("caption_dropout", "Share of the steps that train without caption."),
        _count("caption_seed", 0, 0, 2**63 - 1, "Of shuffled and dropped tags."),
    ]  # fmt: skip


def _of_files() -> list[io.Input]:
    return [
        _count("frames", 17, 0, 1000, "Frames of a clip, for a VAE of videos cut to what it keeps "
               "(1, 5, 9, ...); for others the most single frames of a video. 1: single frames. "
               "0: no videos."),
        _count("frame_step", 1, 1, 1000, "Take each so many-th frame."),
        _count("clips", 1, 1, 1000, "The most clips out of one video, spread over it."),
        _switch("subfolders", True, "Also look into folders in the folder. '10_name' is visited "
                "10 times an epoch, 'reg' holds regularisation pictures."),
        _switch("balance_regularisation", True, "Visit regularisation pictures as often as the "
                "rest, by repeating them."),
        _choice("unusable_files", ("skip", "error"), "Leave out broken files and report them, or "
                "stop at the first."),
    ]  # fmt: skip


class DatasetFolder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdapterLabDatasetFolder",
            display_name="Training Dataset from Folder",
            category=f"{CATEGORY}/train",
            description="Encodes pictures, videos and captions of a folder for training, in "
            "buckets of their aspects. What was encoded before is not encoded again.",
            search_aliases=["lora training", "training data", "dataset", "buckets", "captions"],
            has_intermediate_output=True,
            inputs=[*_usual(), *_of_pictures(), *_of_captions(), *_of_files()],
            hidden=[io.Hidden.unique_id],
            outputs=[
                TrainDatasetType.Output(display_name="dataset", tooltip="For Train Adapter."),
                report_output("Items, buckets, what came from the cache, what was left out."),
            ],
        )

    @classmethod
    def fingerprint_inputs(
        cls, folder: str | None, subfolders: bool | None = None, **_: Any
    ) -> str | float:
        if folder is None:  # comes from another node, and is not known yet
            return float("nan")
        root = _root(folder)
        return listing(root, subfolders is not False) if root.is_dir() else ""

    @classmethod
    def execute(cls, vae: Any, clip: Any, folder: str, name: str, **options: Any) -> io.NodeOutput:
        # Not before it is needed: ComfyUI starts sooner without an encoder.
        from .host.folder import build

        job = _job(vae, clip, folder, name, options)
        with torch.inference_mode(False):
            dataset, report = build(job, cls.hidden.unique_id if cls.hidden else None)
        return io.NodeOutput(dataset, report, ui=panel(report))


def _root(folder: str) -> Path:
    if not folder.strip():
        raise AdapterLabError(
            "No folder is given", expected="a full path, or a folder in ComfyUI's input folder"
        )
    return paths.input_folder(folder.strip())


def _job(vae: Any, clip: Any, folder: str, name: str, options: dict[str, Any]) -> FolderJob:
    from .host.folder import FolderJob

    captions = CaptionConfig(
        extension=options["caption_extension"],
        lines=options["caption_lines"],
        missing=options["missing_captions"],
        trigger=options["trigger"],
        dropout=options["caption_dropout"],
        seed=options["caption_seed"],
        **{key: options[key] for key in ("prefix", "suffix", "separator", "keep_tokens",
                                         "shuffles", "tag_dropout")},
    )  # fmt: skip
    resolution = options["resolution"]
    buckets = Buckets(resolution, min(options["bucket_step"], resolution), options["upscale"],
                      square=not options["buckets"])  # fmt: skip
    return FolderJob(
        vae=vae, clip=clip, root=_root(folder), name=name.strip(), buckets=buckets,
        captions=captions, flip=options["flip"], frames=options["frames"],
        every=options["frame_step"], clips=options["clips"], masks=options["masks"],
        recursive=options["subfolders"], on_unusable=options["unusable_files"],
        balance=options["balance_regularisation"],
    )  # fmt: skip


NODES = [DatasetFolder]
