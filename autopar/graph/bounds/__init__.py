"""Facts about a constant tensor without computing it. In: the nodes of a torch.fx graph that compute it, which depend on
no input. Out: bounds of its elements over boxes of positions, and from these the form of an attention mask of any
length.

constants               which nodes are constant, and the tensors of the small ones at a batch of two samples
boxes, pyramid          boxes and bounds; the least and greatest elements of a computed tensor over boxes
pointwise, movement     interval arithmetic of element-wise ops; ops that fill, rearrange, repeat, join or select
strided                 views: the positions of the source that a view's positions stand for
constant_tensors        bounds of a node from those of the nodes that it reads
mask_form               branch and bound over the boxes of a mask: all ones, causal, or neither
"""
