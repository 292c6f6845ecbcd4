"""How does the student come near the cached teacher?  Raw clips and teacher logits in, a student and its results out.

Only here: modality dropout, KL, the word "student".  Never here: a teacher's forward pass while training.
"""
