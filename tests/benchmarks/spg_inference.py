# SPDX-License-Identifier: Apache-2.0

"""What SPG costs on top of its frozen backbone.

    python -m tests.benchmarks.spg_inference

Times whole forward passes (image tensor to map and score) against the bare backbone stopped at the same block, in turn
in one run, and prints the median ratio with its quartiles. Random weights: they do not change the time.
"""

import argparse
import time

import torch

from anomalib_spg import SPGModel


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="vit_small_patch14_dinov2.lvd142m")
    parser.add_argument("--layer", type=int, default=-1)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    model = SPGModel(arguments.backbone, layers=[arguments.layer], pre_trained=False, image_size=(448, 448))
    dim = model.backbone.embed_dim
    model.guides[0].set(
        torch.nn.functional.normalize(torch.randn(500, dim), dim=1), torch.arange(500), torch.rand(4, 500)
    )
    model.to(device).eval()

    def seconds(function: torch.nn.Module, images: torch.Tensor) -> float:
        start = time.perf_counter()
        function(images)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    print("| batch | SPG / backbone, median (quartiles) | backbone, ms per image |\n|---|---|---|")
    with torch.inference_mode():
        for batch in (1, 8):
            images = torch.randn(batch, 3, 448, 448, device=device)
            seconds(model, images)
            pairs = []
            for run in range(arguments.runs):
                order = (model, model.backbone) if run % 2 else (model.backbone, model)
                times = {function: seconds(function, images) for function in order}
                pairs.append((times[model], times[model.backbone]))
            whole, bare = torch.tensor(pairs).T
            low, median, high = (whole / bare).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
            print(f"| {batch} | {median:.3f} ({low:.3f} to {high:.3f}) | {bare.median().item() * 1e3 / batch:.0f} |")


if __name__ == "__main__":
    main()
