"""Matching of clusters to classes: one confusion matrix against comparing every (cluster, class) pair over all pixels.

    python scripts/bench_matching.py

Both from the same labels in one run, with the matches compared. The plain side is the published procedure in numpy:
for each pair three comparisons and the counts of tp, fp and fn.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from neco.eval import metrics


def every_pair(prediction: np.ndarray, target: np.ndarray, clusters: int, classes: int, precision: bool) -> np.ndarray:
    """Precision or IoU of each (cluster, class), (K, C), from the pixels each time."""
    scores = np.zeros((clusters, classes))
    for cluster in range(clusters):
        for label in range(classes):
            here, wanted = prediction == cluster, target == label
            tp, fp, fn = (here & wanted).sum(), (here & ~wanted).sum(), (~here & wanted).sum()
            scores[cluster, label] = tp / max(tp + fp if precision else tp + fp + fn, 1)
    return scores


def plain(prediction: np.ndarray, target: np.ndarray, clusters: int, classes: int, one_to_one: bool) -> np.ndarray:
    """Class of each cluster, by way of `every_pair`."""
    scores = every_pair(prediction, target, clusters, classes, precision=not one_to_one)
    if not one_to_one:
        return scores.argmax(1)
    mapping = np.zeros(clusters, int)
    labels, matched = linear_sum_assignment(1 - scores.T)
    mapping[matched] = labels
    return mapping


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median of several runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, default=200_000)
    parser.add_argument("--clusters", type=int, default=500)
    parser.add_argument("--classes", type=int, default=21)
    options = parser.parse_args()
    torch.set_num_threads(1)  # as numpy on the other side
    rng = np.random.default_rng(0)
    target = rng.integers(options.classes, size=options.pixels)
    guess = (target * options.clusters // options.classes + rng.integers(40, size=options.pixels)) % options.clusters
    prediction = np.where(rng.random(options.pixels) < 0.7, guess, rng.integers(options.clusters, size=options.pixels))
    labels = torch.from_numpy(prediction), torch.from_numpy(target)
    size = options.clusters, options.classes
    print(f"{options.pixels} pixels, {options.clusters} clusters, {options.classes} classes, one thread")
    for name, match in (("one to one", metrics.match_one_to_one), ("many to one", metrics.match_many_to_one)):

        def fast(match: Callable[[torch.Tensor], torch.Tensor] = match) -> torch.Tensor:
            return match(metrics.confusion(*labels, *size))

        def slow(one_to_one: bool = name == "one to one") -> np.ndarray:
            return plain(prediction, target, *size, one_to_one)

        equal = np.array_equal(fast().numpy(), slow())
        ours, theirs = seconds(fast, 20), seconds(slow, 1)
        print(
            f"{name:>11}: every pair {theirs:7.2f} s, confusion matrix {ours * 1e3:6.2f} ms, "
            f"{theirs / ours:.0f} times faster, {'same' if equal else 'DIFFERENT'} matches"
        )
        if not equal:
            raise SystemExit("the matches differ")


if __name__ == "__main__":
    main()
