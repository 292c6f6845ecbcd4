"""What are this clip's tokens?  A modality's array in, tokens [B, K, D] out.

Only here: timm, backbones.  Never here: a loss, a label.
"""
