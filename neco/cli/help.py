"""What `python -m neco --help` prints."""

from neco.config import discovery
from neco.utils.errors import NecoError
from neco.utils.yaml_file import load_yaml

USAGE = """neco: dense post-training of vision transformers, and what it does to their features

  python -m neco [GROUP=OPTION ...] [KEY=VALUE ...]       -m: one job for every combination of comma-separated values

examples
  python -m neco task=train dataset=coco model=dinov2r_vits14 dataset@val_dataset=camvid
  python -m neco task=eval checkpoint=runs/my_run weights=teacher dataset=camvid eval=[retrieval,overcluster]
  python -m neco task=finetune checkpoint=runs/my_run dataset=camvid finetune.decoder=linear
  python -m neco -m task=eval model=dinov2_vits14,dino_vits16 dataset=camvid eval=overcluster eval.overcluster.k=11,300

"""


def usage() -> str:
    """The groups and their options, each with the first comment of its file; imports nothing heavy."""
    lines = [USAGE + "groups"]
    for group in ("task", "model", "dataset", "eval", "loss", "augment", "logger", "experiment", "sweep", *HYDRA):
        for index, name in enumerate(discovery.options(group)):
            lines.append(f"  {group if not index else '':<14} {name:<20} {first_comment(group, name)}".rstrip())
    lines.append("\nkeys: python -m neco task=train --cfg job      errors with a traceback: debug=true")
    return "\n".join(lines)


def first_comment(group: str, name: str) -> str:
    """What the file of an option says of it in its first comment, or why it cannot be read."""
    try:
        path = discovery.find(group, name)
        load_yaml(path)
        comments = (line[2:] for line in path.read_text("utf-8-sig").splitlines() if line.startswith("# "))
        return next((line for line in comments if not line.startswith("@package")), "")
    except (NecoError, OSError) as error:
        return f"cannot be used: {error}"


HYDRA = ("hydra/launcher", "hydra/sweeper")
