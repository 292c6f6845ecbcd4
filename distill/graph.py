"""The student as one graph without branches: every backbone runs on every clip, and masks do the rest."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..data.errors import ExportError, is_memory_short
from ..data.noise import noise
from ..data.theta import theta_average
from ..extract.backbone import Backbone
from .model import ClipModel

PRESENT, TOKENS = "present", "tokens"
# What tracing ends in where a module branches on values, or does what a graph has no operation for.
UNTRACEABLE = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, LookupError)

Made = TypeVar("Made")
# A program, and the names of its outputs, to whatever is made of it.
Convert = Callable[[ExportedProgram, Sequence[str]], Made]


class StudentGraph(nn.Module):
    """Answers as the student does, without asking which clips have what: what is missing is computed, then masked.

    Every modality keeps all of its places; where the student leaves tokens out (`ignore`, B.1), attention and averages
    do not look at them.
    """

    def __init__(self, student: ClipModel) -> None:
        super().__init__()
        self.student = student

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Return head -> [B, N_h] from modality -> [B, *input_shape] and `present` [B, M] bool.

        What sits in the rows of a missing modality does not matter, not even NaN.
        """
        student, present, tokens = self.student, inputs[PRESENT], {}
        for column, modality in enumerate(student.modalities):
            x, missing = inputs[modality], ~present[:, column]
            # Before the backbone too: a category that does not exist would be looked up in it.
            x = x.masked_fill(missing.view(-1, *[1] * (x.ndim - 1)), 0)
            found = student.backbones[modality](x)
            tokens[modality] = theta_average(found, student.theta) if student.theta else found
        return student.fusion.fuse(student.fusion.embedding.masked(tokens, present), present).logits


class BackboneGraph(nn.Module):
    """One backbone alone, to find out which of them is at fault."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Return tokens [B, K, D] of the one modality."""
        (x,) = inputs.values()
        return {TOKENS: self.backbone(x)}


def traced(student: ClipModel, names: Mapping[str, str], convert: Convert[Made]) -> Made:
    """Trace a student that is in evaluation mode on the CPU; return what `convert` makes of the program.

    names: modality -> name of its backbone.  The program takes, by keyword, one tensor a modality in the student's
    order, then `present`, of any number of clips from 1 on.  It holds no example and no path of this machine.
    Raises ExportError, which names the backbone at fault if it is one, where there is no graph of it.
    """
    inputs = {
        modality: torch.from_numpy(noise(modality, backbone.input_shape, 3))
        for modality, backbone in student.backbones.items()
    }
    every = torch.ones(3, len(inputs), dtype=torch.bool)
    try:
        return convert(_program(StudentGraph(student), {**inputs, PRESENT: every}), [*student.fusion.n_classes])
    except UNTRACEABLE as error:
        if is_memory_short(error):
            raise
        whose, reason = "this student", error
    for modality, backbone in student.backbones.items():
        try:
            convert(_program(BackboneGraph(backbone), {modality: inputs[modality]}), [TOKENS])
        except UNTRACEABLE as error:
            whose, reason = f"{names[modality]}, the backbone of {modality},", error
            break
    said = str(reason).strip().partition("\n")[0].rstrip(".")
    raise ExportError(f"There is no graph of {whose} to export: {said}. Train a student with another backbone.")


def _program(graph: nn.Module, inputs: dict[str, Tensor]) -> ExportedProgram:
    batch = Dim("batch", min=1)
    shapes = {"inputs": {name: {0: batch} for name in inputs}}
    with torch.no_grad():
        program = torch.export.export(graph.eval(), (), inputs, dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    program.example_inputs = None  # else it would be pickled into the file
    return program
