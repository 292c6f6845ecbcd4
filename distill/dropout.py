"""Modality dropout under the name that the paper's student has it by; the teacher of its later version has it too."""

from ..fuse.dropout import modality_dropout, seeded_dropout

__all__ = ["modality_dropout", "seeded_dropout"]
