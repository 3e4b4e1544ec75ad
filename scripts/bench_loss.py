"""Time and memory of the loss beside PyPI `diffsort`, which the published implementation uses.

Forward and backward to the student's embeddings: cosine similarities to n references, teacher and student sorted at the
default steepness of the relaxation (cauchy: 100), cross-entropy.

On the CPU one crop pair with n patches an image. Each case runs in its own process; the two of a network take turns, so
that whatever else the machine does meets both. Memory is the growth of the process's peak (VmHWM) over what it held
after imports, inputs and a first run on 64 rows.

    python scripts/bench_loss.py --rows 3136 --n 49 --repeat 5

On a GPU all crop pairs of a step: the engines triton and torch and diffsort take turns, diffsort in pieces that fit
into memory. Memory is the growth of the allocator's peak; the first run, which compiles, is not counted.

    python scripts/bench_loss.py --device cuda --batch 64 --pairs 10 --n 49 64 128 256
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from neco.loss.neco import NeCo
from neco.loss.relaxation import choose
from neco.utils.errors import NecoError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if gpu else "cpu", help="cpu or cuda (default: %(default)s)")
    counts = [49, 64, 128, 256] if gpu else [49]
    parser.add_argument("--n", type=int, nargs="+", default=counts, help="references of a patch (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=256, help="channels (default: %(default)s)")
    parser.add_argument("--relaxation", default="cauchy", help="relaxation of a comparator (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions of each case (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=3136, help="CPU: patches, images x n (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU: threads of torch (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="GPU: images (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=10, help="GPU: pairs of views (default: %(default)s)")
    parser.add_argument("--patches", type=int, default=49, help="GPU: patches of an image (default: %(default)s)")
    parser.add_argument("--network", nargs="+", default=["bitonic", "odd_even"], help="(default: both)")
    parser.add_argument("--engines", action="store_true", help="the table of the GPU on any device")
    parser.add_argument("--case", nargs=3, metavar=("NETWORK", "N", "WHO"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.case:
        serve(args)
    elif args.engines or args.device != "cpu":
        engines(args)
    else:
        processes(args)


def engines(args: argparse.Namespace) -> None:
    """One table of everything, in this process."""
    device = torch.device(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}: {args.pairs} pairs x {args.batch} images x {args.patches} patches, D={args.dim}, ", end="")
    print(f"{args.relaxation}, float32, median of {args.repeat}")
    print("network   |   n | engine   |        ms | diffsort / it |      MB | loss")
    for network in args.network:
        for n in args.n:
            case = inputs(args.pairs, args.batch, args.patches, n, args.dim, device)
            found: dict[str, list[float]] = {}
            said: dict[str, tuple[float, float]] = {}
            steps = {who: stepper(who, network, n, args.relaxation, device) for who in ("triton", "torch", "diffsort")}
            for turn in range(args.repeat + 1):
                for who, step in list(steps.items()):
                    try:
                        seconds, loss, memory = measure(step, case, device)
                    except (NecoError, torch.cuda.OutOfMemoryError) as error:
                        print(f"{network:9} | {n:3} | {who:8} | {error}", flush=True)
                        del steps[who]
                        continue
                    said[who] = loss, memory
                    if turn:
                        found.setdefault(who, []).append(seconds)
            times = {who: statistics.median(seconds) for who, seconds in found.items()}
            for who, seconds in times.items():
                ratio = times.get("diffsort", float("nan")) / seconds
                print(
                    f"{network:9} | {n:3} | {who:8} | {1e3 * seconds:9.2f} | {ratio:12.1f}x | "
                    f"{said[who][1]:7.0f} | {said[who][0]:.6f}",
                    flush=True,
                )


def measure(step: Callable[..., float], case: list[Tensor], device: torch.device) -> tuple[float, float, float]:
    """Seconds, loss and megabytes of one step."""
    case[0].grad, gpu, before = None, device.type == "cuda", 0
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    loss = step(*case)  # reads the loss, which waits for the GPU, and for the backward pass before it
    seconds = time.perf_counter() - start
    return seconds, loss, (torch.cuda.max_memory_allocated() - before) / 1e6 if gpu else 0.0


def processes(args: argparse.Namespace) -> None:
    """The table of the CPU."""
    for n in args.n:
        print(f"{args.rows} rows, n={n}, D={args.dim}, {args.relaxation}, float32, {args.threads} threads, ", end="")
        print(f"{args.repeat} repetitions")
        print("network   | neco s | diffsort s |         faster (min..max) | neco MB | diffsort MB | less | loss")
        for network in args.network:
            ours, theirs = take_turns(network, n, args)
            ratios = [b / a for a, b in zip(ours["seconds"], theirs["seconds"], strict=True)]
            print(
                f"{network:9} | {statistics.median(ours['seconds']):6.3f} | "
                f"{statistics.median(theirs['seconds']):10.3f} | "
                f"{statistics.median(ratios):8.1f}x ({min(ratios):5.1f}..{max(ratios):5.1f}) | "
                f"{ours['megabytes']:7.0f} | {theirs['megabytes']:11.0f} | "
                f"{theirs['megabytes'] / ours['megabytes']:3.0f}x | {ours['loss']:.6f} {theirs['loss']:.6f}",
                flush=True,
            )


def take_turns(network: str, n: int, args: argparse.Namespace) -> list[dict]:
    """Start a process for each side, let each do one repetition in turn, and collect what they say."""
    command = [sys.executable, __file__, *sys.argv[1:], "--case", network, str(n)]
    sides = [
        subprocess.Popen([*command, who], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for who in ("torch", "diffsort")
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
    network, n, who = args.case[0], int(args.case[1]), args.case[2]
    device = torch.device("cpu")
    step = stepper(who, network, n, args.relaxation, device)
    step(*inputs(1, max(1, 64 // n), n, n, args.dim, device))
    case = inputs(1, max(1, args.rows // n), n, n, args.dim, device)
    before = megabytes("VmRSS")
    for _ in sys.stdin:
        seconds, loss, _ = measure(step, case, device)
        print(json.dumps({"seconds": seconds, "loss": loss, "megabytes": megabytes("VmHWM") - before}), flush=True)


def stepper(who: Any, network: Any, n: int, relaxation: Any, device: torch.device) -> Callable[..., float]:
    """A function of student, teacher (P, B, N, D) and references (P, B, n, D): the loss, after its backward pass."""
    if who != "diffsort":
        criterion = NeCo(network=network, relaxation=relaxation, reference_count=n, engine=who)

        def ours(student: Tensor, teacher: Tensor, references: Tensor) -> float:
            loss, _ = criterion(student, teacher, references)
            loss.backward()
            return loss.item()

        return ours
    from diffsort import DiffSortNet

    sorter = DiffSortNet(network, n, str(device), choose(relaxation).steepness, distribution=relaxation)
    stages = (n - 1).bit_length()
    depth = n if network == "odd_even" else stages * (stages + 1) // 2
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else 1 << 35
    rows = max(1, free // 8 // (4 * n * n * depth))  # it keeps a permutation for each row and layer, and works on more

    def theirs(student: Tensor, teacher: Tensor, references: Tensor) -> float:
        references = normalize(references, dim=-1).mT
        with torch.no_grad():
            of_teacher = (normalize(teacher, dim=-1) @ references).flatten(0, 2)
        similar = (normalize(student, dim=-1) @ references).flatten(0, 2)
        leaf, total = similar.detach().requires_grad_(), similar.new_zeros(())
        for y, x in zip(of_teacher.split(rows), leaf.split(rows), strict=True):
            with torch.no_grad():
                _, q = sorter(y)
            loss = -(q * sorter(x)[1].log()).sum(-1).sum() / leaf.numel()
            loss.backward()
            total += loss.detach()
        similar.backward(leaf.grad)
        return total.item()

    return theirs


def inputs(pairs: int, images: int, patches: int, n: int, dim: int, device: torch.device) -> list[Tensor]:
    """Teacher patches that resemble each other, a student that is near them, references from the same pool."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, pairs, images, patches, dim, generator=generator)
    teacher = 0.5 * torch.randn(dim, generator=generator) + noise[0]
    dealt = torch.randint(images * patches, (pairs, images, n), generator=generator)
    references = torch.stack([pool.flatten(0, 1)[at] for pool, at in zip(teacher, dealt, strict=True)])
    student = (teacher + 0.3 * noise[1]).to(device).requires_grad_()
    return [student, teacher.to(device), references.to(device)]


def megabytes(what: str) -> float:
    """Resident memory of this process, now (VmRSS) or at most (VmHWM)."""
    if (status := Path("/proc/self/status")).exists():
        return int(status.read_text().split(f"{what}:")[1].split()[0]) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # macOS: bytes, and only the peak


if __name__ == "__main__":
    main()
