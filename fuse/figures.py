"""Figures as SVG, for reports of every stage."""

import io

import matplotlib
from matplotlib.figure import Figure


def as_text(name: str) -> str:
    """Return a name that a figure shows as it is: two dollar signs would make mathematics of what is between."""
    return name.replace("$", r"\$")


def svg(figure: Figure) -> str:
    """Return a figure as an <svg> element; the same figure gives the same text."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "karmma"}):
        figure.savefig(text, format="svg", metadata={"Date": None}, bbox_inches="tight")
    return text.getvalue()[text.getvalue().index("<svg") :]
