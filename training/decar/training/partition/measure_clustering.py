"""How long clustering takes and how even it comes out: `python -m decar.training.partition.measure_clustering --help`.

The data are unit vectors around 200 centres of very different popularity.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from decar.training.partition.cluster import balanced_kmeans, two_stage_kmeans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--dimensions", type=int, default=128)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--method", choices=["kmeans", "two-stage"], default="two-stage")
    parser.add_argument("--fine-clusters", type=int, default=1_024)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((200, arguments.dimensions), dtype=np.float32)
    own = centres[rng.choice(200, arguments.samples, p=rng.dirichlet(np.full(200, 0.3)))]
    features = own + 1.5 * rng.standard_normal(own.shape, dtype=np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    started = time.perf_counter()
    if arguments.method == "two-stage":
        found = two_stage_kmeans(
            features,
            arguments.experts,
            fine_clusters=arguments.fine_clusters,
            seed=0,
            restarts=4,
            max_iterations=50,
        )
    else:
        found = balanced_kmeans(features, arguments.experts, seed=0, restarts=4, max_iterations=50)
    elapsed_s = time.perf_counter() - started
    sizes = np.bincount(found.labels, minlength=arguments.experts)
    print(
        f"{arguments.method}: {arguments.samples:,} × {arguments.dimensions} into {arguments.experts}: "
        f"{elapsed_s:.1f} s, largest/smallest {sizes.max() / sizes.min():.5f}, mean cosine {found.objective:.4f}"
    )


if __name__ == "__main__":
    main()
