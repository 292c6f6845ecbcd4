"""Video Swin with planned and fused window attention against torchvision's own: forward, and forward with backward.

    python bench/swin.py [--model swin3d_t] [--repeats 5] [--frames 32] [--size 224] [--json]

One clip, float32, the same weights on both sides, which take turns in one process; medians, and the median of the
ratios of each turn. Largest differences of tokens and gradients are printed beside them, the largest gradient being 1.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch is loaded

import torch
import torchvision.models.video as theirs
from karmma.extract.backbones import build_backbone
from torch import Tensor, nn

# What is asked for on a CPU, at 32 x 224 x 224.
ASKED = {"forward": 1.6, "forward and backward": 1.4}


def build(model: str, shape: tuple[int, ...]) -> tuple[nn.Module, nn.Module]:
    """Return our backbone and torchvision's network with its weights; both without stochastic depth.

    Biases of places are drawn large enough to matter: as they are at first, one could leave them out unseen.
    """
    ours, plain = build_backbone(model, "video", shape), getattr(theirs, model)(weights=None)
    for name, parameter in ours.named_parameters():
        if name.endswith("bias_table"):
            nn.init.normal_(parameter)
    missing = plain.load_state_dict(ours.state_dict(), strict=False)
    assert set(missing.missing_keys) == {"head.weight", "head.bias"}, missing
    for network in (ours, plain):
        for module in network.modules():
            if type(module).__name__ == "StochasticDepth":
                module.p = 0.0
    return ours, plain


def by_karmma(network: nn.Module, x: Tensor) -> Tensor:
    """Return tokens [1, K, D] of normalised pixels [1, 3, T, H, W]."""
    return network.norm(network.features(network.patch_embed(x))).flatten(1, 3)


def by_torchvision(network: nn.Module, x: Tensor) -> Tensor:
    """Do the same with torchvision's own network."""
    return network.norm(network.features(network.pos_drop(network.patch_embed(x)))).flatten(1, 3)


def seconds(pass_: Callable[[], object]) -> float:
    """Return how long a pass takes."""
    start = time.perf_counter()
    pass_()
    return time.perf_counter() - start


def forward(run: Callable[[], Tensor]) -> Tensor:
    """Run without gradients."""
    with torch.inference_mode():
        return run()


def backward(network: nn.Module, run: Callable[[], Tensor]) -> None:
    """Run with gradients of every parameter."""
    network.zero_grad()
    run().square().mean().backward()


def differences(ours: nn.Module, plain: nn.Module, x: Tensor) -> tuple[float, float]:
    """Return the largest differences of tokens, and of gradients to the largest gradient."""
    tokens = forward(lambda: by_karmma(ours, x)), forward(lambda: by_torchvision(plain, x))
    backward(ours, lambda: by_karmma(ours, x))
    backward(plain, lambda: by_torchvision(plain, x))
    wanted = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    largest = max(grad.abs().max().item() for grad in wanted.values())
    off = max((p.grad - wanted[name]).abs().max().item() for name, p in ours.named_parameters())
    return (tokens[0] - tokens[1]).abs().max().item(), off / largest


def main() -> None:
    """Time both sides in turns and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("swin3d_t", "swin3d_s", "swin3d_b"), default="swin3d_t")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.manual_seed(0)
    ours, plain = build(asked.model, (asked.frames, 3, asked.size, asked.size))
    x = torch.randn(1, 3, asked.frames, asked.size, asked.size)
    tokens_off, gradients_off = differences(ours, plain, x)
    sides = {"karmma": (ours, lambda: by_karmma(ours, x)), "torchvision": (plain, lambda: by_torchvision(plain, x))}
    passes = {
        "forward": {name: (lambda run=run: forward(run)) for name, (_, run) in sides.items()},
        "forward and backward": {name: (lambda n=n, run=run: backward(n, run)) for name, (n, run) in sides.items()},
    }
    found = {"model": asked.model, "tokens_off": tokens_off, "gradients_off": gradients_off}
    for what, ways in passes.items():
        ours.train(what != "forward")
        plain.train(what != "forward")
        turns = [{name: seconds(way) for name, way in ways.items()} for _ in range(asked.repeats)]
        medians = {name: statistics.median(turn[name] for turn in turns) for name in ways}
        ratio = statistics.median(turn["torchvision"] / turn["karmma"] for turn in turns)
        found[what] = {**medians, "ratio": ratio, "asked": ASKED[what]}
    if asked.json:
        print(json.dumps(found))
        return
    print(f"{asked.model}, tokens differ by {tokens_off:.1e} at most, gradients by {gradients_off:.1e} of the largest")
    for what in passes:
        row = found[what]
        missed = "" if row["ratio"] >= row["asked"] else "  MISSED"
        print(
            f"{what:22}karmma {row['karmma']:6.2f} s  torchvision {row['torchvision']:6.2f} s  "
            f"{row['ratio']:.2f}x (asked: {row['asked']}x){missed}"
        )


if __name__ == "__main__":
    main()
