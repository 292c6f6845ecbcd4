"""Which action do these tokens show?  Tokens and `present` in, logits by head out.

Only here: fusion block, heads, CE, InfoNCE, metrics, the training loop.  Never here: a pixel.
"""
