"""One step of the student beside a cached teacher against the paper's plain way, in CPU time.

    python bench/distill.py [--table clips.csv] [--steps 3] [--batch 6] [--frames 32] [--size 112] [--json]

Student with Swin-T for V and F and AST-T for A, and the classes of EPIC-KITCHENS-100. Each step takes another batch of
real clips (`--table`; else the sample data, made for it) under modality dropout of 0.5 whose masks are fixed by a seed;
stochastic depth is off on both sides, the weights are the same.

karmma       what was not dropped is decoded and run; the teacher's logits come from an array.
plain        all is decoded; torchvision's own eager Swin runs on all modalities, in float32, then what was dropped is
             masked. This is the student alone, and with the live teacher: three frozen Swin-B and its fusion model.

Both sides decode in this process, and take turns; sums of CPU seconds over the steps, and their ratios. Loss and
largest difference of gradients (the largest gradient being 1) are those of the first step.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch is loaded

import numpy as np
import torch
import torchvision.models.video as theirs
from karmma.data.clips import read_clip_table
from karmma.data.config import DataConfig
from karmma.data.device import arithmetic, has_bfloat16
from karmma.data.raw import read_clip
from karmma.data.sample import write_sample
from karmma.data.theta import theta_average
from karmma.data.views import draw_view
from karmma.distill.clip_dropout import ClipDropout
from karmma.distill.config import StudentConfig
from karmma.distill.dropout import seeded_dropout
from karmma.distill.losses import kl_divergence
from karmma.distill.model import ClipModel, build_model
from karmma.distill.student import build_student
from karmma.extract.backbone import Backbone
from karmma.extract.backbones import build_backbone
from karmma.fuse.config import TeacherConfig
from karmma.fuse.losses import cross_entropy
from karmma.fuse.seeds import clip_seeds
from torch import Tensor, nn

M = ("video", "flow", "audio")
CLASSES = {"verb": 97, "noun": 300}
SWIN_T, SWIN_B = ({"name": name, "weights": "none"} for name in ("swin3d_t", "swin3d_b"))
ASKED = {"float32": {"live": 5.0, "alone": 2.2}, "bfloat16": {"live": 8.0, "alone": 3.0}}


class EagerSwin(Backbone):
    """torchvision's own network where ours has its planned and fused attention; the same weights."""

    def __init__(self, ours: Backbone, name: str) -> None:
        super().__init__(ours.input_shape, ours.n_tokens, ours.width)
        self.pixels, self.network = ours.pixels, getattr(theirs, name)(weights=None)
        self.network.head = nn.Identity()
        self.network.load_state_dict(ours.state_dict())

    def tokens(self, x: Tensor) -> Tensor:
        """Do what torchvision's `forward` does before it averages."""
        x = self.network.pos_drop(self.network.patch_embed(self.pixels(x)))
        return self.network.norm(self.network.features(x)).flatten(1, 3)


def eager(model: ClipModel, name: str) -> ClipModel:
    """Return the same model with torchvision's Swin; what is no Swin, and the fusion model, are shared."""
    swins = {m: EagerSwin(one, name) for m, one in model.backbones.items() if hasattr(one, "patch_embed")}
    return ClipModel({**model.backbones, **swins}, model.fusion, model.theta)


def steady(model: nn.Module) -> nn.Module:
    """Turn stochastic depth off."""
    for module in model.modules():
        if isinstance(module, ClipDropout):
            module.p = 0.0
    return model


class Batches:
    """Batches of real clips, decoded when asked for."""

    def __init__(self, table_path: Path, data: DataConfig, size: int) -> None:
        self.table, self.data, self.size = read_clip_table(table_path, ("verb",)), data, size

    def wanted(self, step: int) -> Tensor:
        """Return which modalities [B, M] are left of a step's clips."""
        seeds = clip_seeds(0, step, [str(clip) for clip in range(self.size)])
        return seeded_dropout(torch.ones(self.size, len(M), dtype=torch.bool), 0.5, seeds)

    def read(self, step: int, wanted: Tensor) -> dict[str, Tensor]:
        """Decode the wanted modalities of a step's clips."""
        arrays: dict[str, list[np.ndarray]] = {modality: [] for modality in M}
        for at, has in enumerate(wanted.tolist()):
            clip = self.table.clip((step * self.size + at) % self.table.n_clips)
            asked = tuple(modality for modality, want in zip(M, has, strict=True) if want)
            found = read_clip(clip, draw_view(clip.clip_id, 1, self.data), asked, self.data)
            for modality in asked:
                assert found[modality].array is not None, (clip.clip_id, found[modality].reason)
                arrays[modality].append(found[modality].array)
        return {modality: torch.from_numpy(np.stack(each)) for modality, each in arrays.items() if each}


def learn(model: ClipModel, logits: Mapping[str, Tensor], target: Mapping[str, Tensor], optimizer: object) -> float:
    """Take the step of Eq. 5; return the loss."""
    config = StudentConfig()
    labels = {head: torch.arange(len(scores)) for head, scores in logits.items()}
    loss = config.gamma * cross_entropy(logits, labels) + config.kl_lambda * kl_divergence(logits, target)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
    optimizer.step()
    return loss.item()


def plainly(model: ClipModel, inputs: Mapping[str, Tensor], present: Tensor) -> dict[str, Tensor]:
    """Run every backbone on every clip, then mask."""
    tokens = {m: theta_average(model.backbones[m](inputs[m]), model.theta) for m in M}
    return model.fusion(tokens, present).logits


def karmma_step(
    student: ClipModel, optimizer: object, batches: Batches, step: int, cached: Mapping[str, Tensor], precision: str
) -> tuple[float, float]:
    """Return CPU seconds and loss of our way."""
    start, wanted = time.process_time(), batches.wanted(step)
    inputs = batches.read(step, wanted)
    with arithmetic(precision, torch.device("cpu")):
        logits = student(inputs, wanted).logits
    loss = learn(student, logits, cached, optimizer)
    return time.process_time() - start, loss


def plain_step(
    student: ClipModel, teacher: ClipModel, optimizer: object, batches: Batches, step: int, cached: Mapping[str, Tensor]
) -> tuple[float, float, float]:
    """Return CPU seconds of the student's part and of the live teacher's, and the loss."""
    start, every = time.process_time(), torch.ones_like(batches.wanted(step))
    inputs = batches.read(step, every)
    decoded = time.process_time()
    with torch.inference_mode():
        plainly(teacher, inputs, every)
    taught = time.process_time()
    # The same targets on both sides, or there would be nothing to compare.
    loss = learn(student, plainly(student, inputs, batches.wanted(step)), cached, optimizer)
    return time.process_time() - taught + decoded - start, taught - decoded, loss


def gradients(model: ClipModel) -> dict[str, Tensor]:
    """Return the gradients under our names."""
    return {n.replace(".network.", "."): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def difference(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Return the largest difference of gradients, the largest one being 1."""
    assert wanted.keys() == found.keys()
    largest = max(grad.abs().max().item() for grad in wanted.values())
    return max((found[name] - grad).abs().max().item() for name, grad in wanted.items()) / largest


def build(data: DataConfig) -> tuple[ClipModel, ClipModel]:
    """Return our student and the live teacher in torchvision's Swin."""
    config, taught = StudentConfig(video=SWIN_T, flow=SWIN_T), TeacherConfig()
    torch.manual_seed(0)
    student = steady(build_student(data, config, CLASSES)).train()
    frozen = {m: build_backbone("swin3d_b", m, data.input_shape(m)) for m in M}
    return student, eager(build_model(frozen, 300, CLASSES, taught).eval(), "swin3d_b").eval()


def measure(asked: argparse.Namespace, table: Path) -> dict[str, object]:
    """Take the steps in turns and return the sums."""
    data = DataConfig(
        modalities=M, frames=asked.frames, size=asked.size, audio_mels=asked.size, audio_steps=asked.size,
        audio_segment_s=asked.size * 160 / 16000, audio_hop=160, flow_size=max(32, min(256, asked.size * 8 // 7)),
    )  # fmt: skip
    batches = Batches(table, data, asked.batch)
    draw = torch.Generator().manual_seed(0)
    cached = {head: torch.randn(asked.batch, n, generator=draw) for head, n in CLASSES.items()}
    student, teacher = build(data)
    weights = {name: value.clone() for name, value in student.state_dict().items()}
    seconds = dict.fromkeys((*asked.precision, "plain student", "live teacher"), 0.0)
    told: dict[str, object] = {"kept": 0.0, "seconds": seconds}
    for step in range(asked.steps):
        losses, found = {}, {}
        for precision in asked.precision:
            student.load_state_dict(weights)
            optimizer = torch.optim.AdamW(student.parameters())
            spent, losses[precision] = karmma_step(student, optimizer, batches, step, cached, precision)
            seconds[precision] += spent
            found[precision] = gradients(student)
        student.load_state_dict(weights)
        plain = steady(eager(student, "swin3d_t")).train()
        optimizer = torch.optim.AdamW(plain.parameters())
        spent, live, losses["plain"] = plain_step(plain, teacher, optimizer, batches, step, cached)
        seconds["plain student"] += spent
        seconds["live teacher"] += live
        told["kept"] += batches.wanted(step).float().mean().item() / asked.steps
        if not step:
            told["losses"] = losses
            told["off"] = {name: difference(each, gradients(plain)) for name, each in found.items()}
        print(f"step {step + 1} of {asked.steps}", file=sys.stderr)
    return told


def show(found: Mapping[str, Any], n_steps: int) -> None:
    """Print seconds a step and ratios."""
    seconds = {name: value / n_steps for name, value in found["seconds"].items()}
    plain, live = seconds.pop("plain student"), seconds.pop("live teacher")
    print(f"CPU seconds a step, {100 * found['kept']:.0f} percent of the clips' modalities kept")
    print(f"plain     {plain + live:7.1f}  ({plain:.1f} student and decoding, {live:.1f} live teacher)")
    for precision, spent in seconds.items():
        ratios = {"live": (plain + live) / spent, "alone": plain / spent}
        missed = "  MISSED" if any(ratios[name] < ASKED[precision][name] for name in ratios) else ""
        print(
            f"{precision:9} {spent:7.1f}  {ratios['live']:.2f}x (asked {ASKED[precision]['live']}x), without live "
            f"teacher {ratios['alone']:.2f}x (asked {ASKED[precision]['alone']}x){missed}; loss "
            f"{found['losses'][precision]:.6f} and {found['losses']['plain']:.6f}, gradients "
            f"{found['off'][precision]:.1e} of the largest apart"
        )
    if "bfloat16" in seconds and not has_bfloat16(torch.device("cpu")):
        print("This processor computes bfloat16 by way of float32.")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path)
    for name, default in (("steps", 3), ("batch", 6), ("frames", 32), ("size", 112)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precision", nargs="+", choices=tuple(ASKED), default=["float32", "bfloat16"])
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if asked.table is None:
            write_sample(Path(folder), n_clips=max(24, asked.batch * asked.steps))
        found = measure(asked, asked.table or Path(folder) / "clips.csv")
    print(json.dumps(found)) if asked.json else show(found, asked.steps)


if __name__ == "__main__":
    main()
