"""What is on disk, and what is it called?  Paths in; clips, tensors, stores and run folders out.

Only here: zarr, media files, `open`.  Never here: a learnable parameter.

Letters used in every room: B batch, T time steps, C H W channels and size, K tokens a backbone gives, k tokens kept
after Theta-Average, D width of a backbone, E width of the fusion block, M modalities, N_h classes of head h, V views.
"""
