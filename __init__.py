"""KARMMA: action recognition that keeps working when a modality is missing.

`data <- extract, fuse <- distill <- cli`: a file imports from its own room or from rooms to its left.
"""

__version__ = "0.1.0"
