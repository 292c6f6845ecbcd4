"""Settings of `karmma extract`: which frozen backbone makes a modality's tokens, and how many are kept."""

from typing import Annotated, Literal

from pydantic import AfterValidator

from ..data.config import StageConfig, Theta, ours, paper


def _fitting(text: str) -> str:
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise ValueError("expected i/n with 1 <= i <= n, such as 2/4")
    return text


Part = Annotated[str, AfterValidator(_fitting)]


class BackboneConfig(StageConfig):
    """A backbone by name and where its weights come from."""

    name: str = ours(..., "registered name, such as swin3d_b", "no one backbone fits every modality")
    weights: str = ours(
        ..., "'kinetics400', a local file, or 'none' (random, from `seed`)", "random weights must be asked for"
    )
    clip_token: bool | None = ours(
        None,
        "a token for the whole clip beside the others; left out: ast and stlt have one, swin3d has none",
        "the paper has 785 tokens of Swin, which gives 784; either gives its GFLOPs",
    )


def backbone(name: str, weights: str) -> BackboneConfig:
    """Return a default for a backbone field."""
    return BackboneConfig(name=name, weights=weights)


class ExtractConfig(StageConfig):
    """What the teacher's frozen backbones are and how the cache is filled."""

    video: BackboneConfig = paper(backbone("swin3d_b", "kinetics400"), "backbone of V", "sec. 4")
    flow: BackboneConfig = paper(backbone("swin3d_b", "kinetics400"), "backbone of F", "sec. 4")
    audio: BackboneConfig = paper(backbone("swin3d_b", "kinetics400"), "backbone of A", "sec. 4")
    detections: BackboneConfig = paper(
        backbone("stlt_12", "stlt_action_genome.safetensors"),
        "backbone of D; a local file, as none is hosted",
        "sec. 4",
    )
    theta: Theta = paper(300, "tokens kept per modality (Theta-Average); none keeps all", "sec. 4", ge=1)
    views: int = ours(1, "views of a training clip; val and test clips get the clean one", "the clean view", ge=1)
    batch_size: int = ours(8, "clips a forward pass", "fits a 16 GB card with Swin-B", ge=1)
    shard_rows: int = ours(128, "clips a shard", "79 MB shards at 300 x 1024 float16", ge=1)
    precision: Literal["float32", "bfloat16"] = ours(
        "float32", "arithmetic of the backbones; bfloat16 is faster and checked against float32", "exact before fast"
    )
    device: str = ours("auto", "torch device; auto takes CUDA where there is one", "convenience")
    threads: int = ours(0, "torch threads; 0 leaves torch's own choice", "torch knows the cores", ge=0)
    seed: int = ours(0, "seed of backbones with weights 'none'", "any number will do")
    readers: int = ours(2, "processes that read clips", "two cores", ge=1)
    part: Part = ours("1/1", "i/n: make every n-th shard only, for machines without a shared disk", "all of it")
    workers: int = ours(1, "processes that compute; more than one are a Dask cluster of this machine", "one", ge=1)
    scheduler: str | None = ours(None, "address of a Dask scheduler whose workers compute, tcp://...", "this machine")
    retry_failed: bool = ours(False, "try clips again that failed before", "failures are mostly in the file")
