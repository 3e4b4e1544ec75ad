"""Run the benchmarks that the machine at hand allows and keep what they say as pages of benchmarks/.

Each page is `benchmarks/<what>_<hardware>_<date>.md`: machine, versions, and each command with its output. Every
benchmark compares both sides in one run; read the ratios.

    python scripts/bench.py                 # all that this machine can do
    python scripts/bench.py step loss       # some
    python scripts/bench.py --list
"""

import argparse
import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from neco.runs.folder import git_state, versions
from neco.runs.results import write

HERE = Path(__file__).parent
END_TO_END = "bench_data.py wait --images 4000 --batch 64 --steps 64 --workers 16 --override augment.global_size=518"
# page: (what it shows, commands)
CPU = {
    "step": (
        "A whole training step beside the published procedure written out",
        ["bench_step.py --profile", "bench_step.py --fast-linear"],
    ),
    "loss": ("Sorting and loss beside diffsort", ["bench_loss.py"]),
    "views": ("Views of an image beside the published pipeline", ["bench_views.py"]),
    "eval": ("Evaluations beside the published procedures", ["bench_eval.py all"]),
    "bank": ("A retrieval memory of ten million patches", ["bench_eval.py bank"]),
    "data": (
        "Reading and listing images",
        ["bench_data.py read", "bench_data.py start --files 1300000 --members 120000"],
    ),
    "options": ("What training options cost", ["bench_train.py"]),
}
GPU = {
    "step": (
        CPU["step"][0],
        [
            "bench_step.py --size 518 --batch 64 --profile",
            "bench_step.py --size 518 --batch 32 --profile --model dinov2r_vitb14",
        ],
    ),
    "loss": (CPU["loss"][0], ["bench_loss.py --network bitonic --repeat 3"]),
    "options": (CPU["options"][0], ["bench_train.py --batch 64 --size 518"]),
    "train": (
        "Training end to end, JPEG decoding included",
        [f"{END_TO_END} model={model}" for model in ("dinov2r_vits14", "dinov2r_vitb14")],
    ),
    "features": (
        "Evaluation at its full size",
        ["bench_features.py retrieval kmeans extract --repeats 1"],
    ),
}


def processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def main() -> None:
    gpu = torch.cuda.is_available()
    pages = GPU if gpu else CPU
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help=f"of {', '.join(pages)} (default: all)")
    parser.add_argument("--list", action="store_true", help="print the commands")
    parser.add_argument("--folder", type=Path, default=HERE.parent / "benchmarks", help="of the pages")
    options = parser.parse_args()
    if unknown := set(options.what) - set(pages):
        parser.error(f"unknown here: {', '.join(sorted(unknown))}; there are {', '.join(pages)}")
    chosen = {name: pages[name] for name in options.what or pages}
    if options.list:
        print("\n".join(f"{name:8} python scripts/{command}" for name, (_, all_) in chosen.items() for command in all_))
        return
    name = torch.cuda.get_device_name() if gpu else f"{processor()}, {os.cpu_count()} cores"
    machine = f"{name}; load {os.getloadavg()[0]:.1f} at the start"
    slug = re.sub(r"\W+", "-", name.lower()).strip("-")
    about = ", ".join(f"{package} {version}" for package, version in versions().items())
    for what, (title, commands) in chosen.items():
        lines = [
            f"# {title}",
            "",
            f"{machine}. Revision {git_state()['git'] or 'unknown'}; Python {platform.python_version()}, {about}.",
        ]
        for command in commands:
            print(f"\n$ python scripts/{command}", flush=True)
            script, *rest = shlex.split(command)
            done = subprocess.run([sys.executable, HERE / script, *rest], stdout=subprocess.PIPE, text=True)
            print(done.stdout, end="")
            if done.returncode:
                raise SystemExit(f"python scripts/{command} ended with {done.returncode}")
            lines += ["", "```sh", f"python scripts/{command}", "```", "", "```", done.stdout.rstrip(), "```"]
        page = options.folder / f"{what}_{slug}_{datetime.date.today()}.md"
        options.folder.mkdir(exist_ok=True)
        write(page, "\n".join(lines) + "\n")
        print(f"\nwrote {page}")


if __name__ == "__main__":
    main()
