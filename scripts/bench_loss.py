"""Time and memory of the loss beside PyPI `diffsort`, which the published implementation uses.

One crop pair, forward and backward to the student's embeddings: cosine similarities to n references, teacher and
student sorted at the default steepness of the relaxation (cauchy: 100), cross-entropy. Each case runs in its own
process; the two of a network take turns, so that whatever else the machine does meets both. Memory is the growth of
the process's peak (VmHWM) over what it held after imports, inputs and a first run on 64 rows.

    python scripts/bench_loss.py --rows 3136 --n 49 --repeat 5
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=49, help="references of a patch (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=3136, help="patches, images x n (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=256, help="channels (default: %(default)s)")
    parser.add_argument("--relaxation", default="cauchy", help="relaxation of a comparator (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions of each case (default: %(default)s)")
    parser.add_argument("--case", nargs=2, metavar=("NETWORK", "WHO"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        return serve(args)
    print(f"{args.rows} rows, n={args.n}, D={args.dim}, {args.relaxation}, float32, {args.threads} threads, ", end="")
    print(f"{args.repeat} repetitions")
    print("network   | neco s | diffsort s |         faster (min..max) | neco MB | diffsort MB | less | loss")
    for network in "bitonic", "odd_even":
        ours, theirs = take_turns(network, args)
        ratios = [b / a for a, b in zip(ours["seconds"], theirs["seconds"], strict=True)]
        print(
            f"{network:9} | {statistics.median(ours['seconds']):6.3f} | {statistics.median(theirs['seconds']):10.3f} | "
            f"{statistics.median(ratios):8.1f}x ({min(ratios):5.1f}..{max(ratios):5.1f}) | {ours['megabytes']:7.0f} | "
            f"{theirs['megabytes']:11.0f} | {theirs['megabytes'] / ours['megabytes']:3.0f}x | "
            f"{ours['loss']:.6f} {theirs['loss']:.6f}",
            flush=True,
        )


def take_turns(network: str, args: argparse.Namespace) -> list[dict]:
    """Start a process for each side, let each do one repetition in turn, and collect what they say."""
    command = [sys.executable, __file__, *sys.argv[1:], "--case", network]
    sides = [
        subprocess.Popen([*command, who], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for who in ("neco", "diffsort")
    ]
    said = [[json.loads(ask(side)) for side in sides] for _ in range(args.repeat)]
    for side in sides:
        side.communicate()
    return [{**last, "seconds": [turn[i]["seconds"] for turn in said]} for i, last in enumerate(said[-1])]


def ask(side: subprocess.Popen) -> str:
    assert side.stdin and side.stdout
    print(file=side.stdin, flush=True)
    return side.stdout.readline()


def serve(args: argparse.Namespace) -> None:
    """The process of one case: a repetition for each line of standard input, its result as a line of JSON."""
    import torch
    from torch.nn.functional import normalize

    network, who = args.case
    torch.set_num_threads(args.threads)
    if who == "neco":
        from neco.loss.neco import NeCo

        criterion = NeCo(network=network, relaxation=args.relaxation)
    else:
        from diffsort import DiffSortNet

        from neco.loss.relaxation import choose

        steepness = choose(args.relaxation).steepness
        sorter = DiffSortNet(network, args.n, steepness=steepness, distribution=args.relaxation)

    def step(student: torch.Tensor, teacher: torch.Tensor, references: torch.Tensor) -> float:
        if who == "neco":
            loss, _ = criterion(student[None], teacher[None], references[None])
        else:
            references = normalize(references, dim=-1).mT
            with torch.no_grad():
                _, q = sorter((normalize(teacher, dim=-1) @ references).flatten(0, 1))
            _, p = sorter((normalize(student, dim=-1) @ references).flatten(0, 1))
            loss = -(q * p.log()).sum(-1).mean()
        loss.backward()
        return loss.item()

    def inputs(images: int) -> list[torch.Tensor]:
        # Teacher patches that resemble each other, a student that is near them, references from the same pool.
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(3, images, args.n, args.dim, generator=generator)
        teacher = 0.5 * torch.randn(args.dim, generator=generator) + noise[0]
        student = (teacher + 0.3 * noise[1]).requires_grad_()
        dealt = torch.randperm(images * args.n, generator=generator)
        return [student, teacher, teacher.flatten(0, 1)[dealt].view_as(teacher)]

    step(*inputs(max(1, 64 // args.n)))
    case = inputs(max(1, args.rows // args.n))
    before = megabytes("VmRSS")
    for _ in sys.stdin:
        case[0].grad = None
        start = time.perf_counter()
        loss = step(*case)
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "loss": loss, "megabytes": megabytes("VmHWM") - before}), flush=True)


def megabytes(what: str) -> float:
    """Resident memory of this process, now (VmRSS) or at most (VmHWM)."""
    if (status := Path("/proc/self/status")).exists():
        return int(status.read_text().split(f"{what}:")[1].split()[0]) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # macOS: bytes, and only the peak


if __name__ == "__main__":
    main()
