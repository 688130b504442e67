# SPDX-License-Identifier: Apache-2.0

"""A folder for the Hugging Face hub: guides, and a model card that says what they are and how to use them.

    python -m anomalib_spg.share --guides results/SPG/my_part/latest/weights/guides.safetensors --folder my_guides
        --repository owner/name --license apache-2.0

Nothing is uploaded. The hub's own command that does it is printed.
"""

import argparse
import math
import re
import shlex
import shutil
import sys
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import EvalResult, ModelCardData
from torch import nn

from .components.files import atomic_write
from .components.hub import local_file
from .components.module_list import ModuleList
from .explanations.examples import Examples, digest
from .figures import plot_guides
from .guides import BUFFERS, GUIDE_NAMES, Guides, read_guides

GUIDES, EXAMPLES, CARD = "guides.safetensors", "examples.safetensors", "README.md"
UNKNOWN = "unknown"  # the hub knows this word, too
TEXT = """\
# {name}: guides of SPG

Guides of [SPG](https://arxiv.org/abs/2604.02871) for [anomalib](https://github.com/open-edge-platform/anomalib) with
the plugin `anomalib-spg-lake`. They find anomalies in images of other things than they were learned on: zero-shot.

## Use

Good parts set the threshold, nothing is learned. Then new images are accepted or rejected:

```bash
pip install anomalib-spg-lake
{commands}
```

In Python: `anomalib_spg.SPG(guides_file="{address}")`

## What they are

| | |
|---|---|
{facts}
{figures}
## Measured

{measured}

## Licence

{licence} The backbone's weights have a licence of their own ({terms}).
"""
LICENCES = {
    UNKNOWN: "**Unknown.** Whoever shared these guides has not said what others may do with them: ask first.",
    "other": "None of those that the hub knows: ask whoever shared these guides.",
}


class _Learned(nn.Module):
    """Guides under the names they have in SPG's torch model, without its backbone."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        super().__init__()
        layers = range(len(tensors) // len(BUFFERS))
        self.guides: ModuleList[Guides] = ModuleList(Guides(tensors[f"{i}.vectors"].shape[1]) for i in layers)
        self.guides.load_state_dict(tensors)


def write_folder(
    guides_file: str | Path,
    folder: str | Path,
    repository: str,
    licence: str,
    examples_file: str | Path | None = None,
    metrics: dict[str, float] | None = None,
    tested_on: str | None = None,
) -> Path:
    """Write what a repository of guides on the hub holds.

    Args:
        guides_file (str | Path): Guides file that training SPG left.
        folder (str | Path): New or empty folder.
        repository (str): Name on the hub, ``owner/name``.
        licence (str): Licence of the guides as the hub names it, such as ``apache-2.0``, or ``unknown``.
        examples_file (str | Path | None): Examples file of the same training, for explanations. It holds training
            images. Defaults to ``None``.
        metrics (dict[str, float] | None): Metrics by name. Defaults to ``None``.
        tested_on (str | None): The images they were measured on. Needed with metrics.

    Returns:
        Path: The folder.

    Raises:
        ValueError: If an argument cannot be used, or a file is not what it should be.
        OSError: If the folder is not empty, or cannot be written to.
    """
    folder, metrics = Path(folder), metrics or {}
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        msg = f"repository='{repository}' must have the form owner/name."
        raise ValueError(msg)
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
        msg = f"license='{licence}' is no name of the hub's: such as apache-2.0, mit, cc-by-4.0, other, or unknown."
        raise ValueError(msg)
    if bool(metrics) != bool(tested_on):
        msg = f"metrics={metrics or None} and tested_on={tested_on!r} go together: figures, and the images they are of."
        raise ValueError(msg)
    if folder.exists() and any(folder.iterdir()):
        msg = f"'{folder}' is not empty, and all of it would be uploaded. Give a new folder."
        raise FileExistsError(msg)
    tensors, metadata = read_guides(guides_file)
    learned = _Learned(tensors)
    examples = None
    if examples_file is not None:
        examples = Examples.load(examples_file)
        if examples.learned != digest(learned):
            msg = f"'{examples_file}' belongs to another training than '{guides_file}'. Leave it out, or give its own."
            raise ValueError(msg)
    figures = {}
    if examples is not None:  # without patches atoms are mere numbers
        for block, guides in zip(metadata.get("layers", range(len(learned.guides))), learned.guides, strict=True):
            figures[f"guides_block{block}.jpg"] = plot_guides(guides, block, examples)
    front = _front_matter(metadata, repository, licence, metrics, tested_on)
    body = _body(metadata, learned, repository, licence, examples, metrics, tested_on, list(figures))
    # From here on there is a folder: what fails above leaves none, so that the command can be given again.
    for source, name in ((examples_file, EXAMPLES), (local_file(guides_file), GUIDES)):
        if source is not None:
            with atomic_write(folder / name) as temporary:
                shutil.copyfile(source, temporary)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=90, pil_kwargs={"quality": 85})
    with atomic_write(folder / CARD) as temporary:
        temporary.write_text(f"---\n{front}\n---\n\n{body}", encoding="utf-8")
    return folder


def _front_matter(
    metadata: dict[str, Any], repository: str, licence: str, metrics: dict[str, float], tested_on: str | None
) -> str:
    """What the hub itself reads."""
    name = repository.partition("/")[2]
    data = ModelCardData(
        license=licence,
        library_name="anomalib",
        pipeline_tag="image-segmentation",
        tags=["anomaly-detection", "zero-shot", "spg"],
        base_model=_on_the_hub(metadata.get("backbone", "")),
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="image-segmentation",
                dataset_type=re.sub(r"[^\w.]+", "-", str(tested_on)).strip("-") or "images",
                dataset_name=str(tested_on),
                metric_type=metric,
                metric_value=value,
            )
            for metric, value in metrics.items()
        ]
        or None,
    )
    return data.to_yaml().strip()


def _body(
    metadata: dict[str, Any],
    learned: _Learned,
    repository: str,
    licence: str,
    examples: Examples | None,
    metrics: dict[str, float],
    tested_on: str | None,
    figures: list[str],
) -> str:
    """What people read."""
    backbone = metadata.get("backbone", "not recorded")
    hub_name, config = _on_the_hub(backbone), timm.get_pretrained_cfg(backbone, allow_unregistered=True)
    counts = [
        ", ".join(f"{name} {int(n)}" for name, n in zip(GUIDE_NAMES, (guides.coefficients > 0).sum(1), strict=True))
        for guides in learned.guides
    ]
    facts = {
        "learned on": _learned_on(metadata.get("trained_on", {})),
        "backbone": f"[{backbone}](https://huggingface.co/{hub_name})" if hub_name else backbone,
        "blocks": ", ".join(str(block) for block in metadata.get("layers", ())),
        "image size": "x".join(str(side) for side in metadata.get("image_size", ())),
        "temperature": metadata.get("temperature", ""),
        "settings": ", ".join(f"{name} {value}" for name, value in metadata.get("settings", {}).items()),
        "atoms": "; ".join(counts),
        "versions": ", ".join(f"{name} {version}" for name, version in metadata.get("versions", {}).items()),
    }
    shown = [f"![What the guides look for]({name})" for name in figures]
    if examples is not None:
        shown.append(f"The patches are of training images; `{EXAMPLES}` holds {len(examples.images)} of them.")
    measured = "Whoever shared these guides gave no figures. Test them on good and bad parts of your own."
    if metrics:
        rows = "\n".join(f"| {_cell(name)} | {value:g} |" for name, value in metrics.items())
        measured = f"On {tested_on}, as whoever shared these guides says:\n\n| metric | |\n|---|---|\n{rows}"
    address = f"hf://{repository}/{GUIDES}"
    return TEXT.format(
        name=repository.partition("/")[2],
        commands=commands(address),
        address=address,
        facts="\n".join(f"| {name} | {_cell(value) or 'not recorded'} |" for name, value in facts.items()),
        figures="".join(f"\n{paragraph}\n" for paragraph in shown),
        measured=measured,
        licence=LICENCES.get(licence, f"{licence}, for the guides."),
        terms=f"{config.license} by timm's record" if config and config.license else "see there",
    )


def commands(address: str, name: str = "my_part") -> str:
    """Lines that use guides of the hub on a folder of good parts, and then on new images.

    Args:
        address (str): Address of the guides file.
        name (str): Name of the part. Defaults to ``"my_part"``.

    Returns:
        str: Lines for a shell.
    """
    model = f"--model SPG --model.guides_file {address}"
    return (
        f"anomalib train {model} \\\n"
        f"    --data Folder --data.name {name} --data.root datasets/{name} --data.normal_dir good \\\n"
        "    --data.test_split_mode none --data.val_split_mode none --trainer.limit_val_batches 0\n"
        f"anomalib predict {model} \\\n"
        f"    --data path/to/new/images --ckpt_path results/SPG/{name}/latest/weights/lightning/model.ckpt"
    )


def _learned_on(trained_on: Any) -> str:  # noqa: ANN401  # whatever a file holds
    """In words what :meth:`SPG.fit` records; others may have recorded other things."""
    known = trained_on if isinstance(trained_on, dict) else {}
    names = " ".join(str(known[key]) for key in ("dataset", "category") if known.get(key))
    categories = known.get("categories") or ()
    listed = ", ".join(map(str, categories if isinstance(categories, list | tuple) else [categories]))
    auxiliary, to, _ = str(known.get("dataset")).partition("_to_")
    if to and known.get("labels") == "labelled":  # AuxiliaryTarget's name and category are those of its target, too
        names, listed = ": ".join(filter(None, [auxiliary, listed])), ""
    kind = {"labelled": "labelled by people", "synthetic": "all good, anomalies drawn on them"}
    images = [f"{known['images']} images"] if known.get("images") else []
    images += filter(None, [kind.get(str(known.get("labels")))])
    return "; ".join(filter(None, [names, listed, ", ".join(images)])) or "not recorded"


def _on_the_hub(backbone: str) -> str | None:
    """Repository of the backbone's weights, if timm knows one."""
    config = timm.get_pretrained_cfg(backbone, allow_unregistered=True) if backbone else None
    return (config and config.hf_hub_id) or None


def _cell(value: Any) -> str:  # noqa: ANN401
    return " ".join(str(value).replace("|", "\\|").split())


def _metric(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    if not name or not math.isfinite(float(value)):
        raise ValueError
    return name, float(value)


def get_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m anomalib_spg.share",
        description="Write a folder with guides and a model card, ready for the Hugging Face hub.",
    )
    parser.add_argument("--guides", required=True, help="guides file that training SPG left")
    parser.add_argument("--folder", required=True, help="new folder to write")
    parser.add_argument("--repository", required=True, help="name on the hub: owner/name")
    parser.add_argument("--license", required=True, help="the hub's name of a licence: apache-2.0, cc-by-4.0, unknown")
    parser.add_argument("--examples", help="examples file of the same training; it holds training images")
    parser.add_argument("--metrics", nargs="+", type=_metric, metavar="NAME=VALUE", help="what the guides reach")
    parser.add_argument("--tested_on", help="the images that the metrics are of")
    return parser


def main() -> None:
    """Command line: ``python -m anomalib_spg.share --help``."""
    args = get_parser().parse_args()
    metrics = dict(args.metrics or ())
    try:
        folder = write_folder(
            args.guides, args.folder, args.repository, args.license, args.examples, metrics, args.tested_on
        )
    except (OSError, RuntimeError, ValueError) as exception:
        sys.exit(f"error: {exception}")
    print(f"{folder}/ holds {', '.join(sorted(path.name for path in folder.iterdir()))}.")
    if args.license == UNKNOWN:
        print("WARNING: the licence is unknown, so that nobody may use the guides. Name one with --license.")
    if args.examples:
        print(f"WARNING: {EXAMPLES} and the figures show training images to everyone who can read the repository.")
    client = (
        "hf" if "hf" in {point.name for point in distribution("huggingface_hub").entry_points} else "huggingface-cli"
    )
    print("Read README.md there, then upload (--private keeps a new repository to yourself):")
    print(f"    {client} upload {args.repository} {shlex.quote(str(folder))} .")


if __name__ == "__main__":
    main()
