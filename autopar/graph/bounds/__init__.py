"""What a constant tensor is without computing it. In: nodes of a torch.fx graph that no input reaches. Out: bounds of
their elements over boxes of positions, and from these the form of an attention mask of any length.

constants               which nodes are constant, and the values of the small ones at a batch of two samples
boxes, pyramid          boxes and bounds; the least and greatest elements of a small tensor over boxes
pointwise, movement     interval arithmetic of element-wise ops; ops that move, repeat or join elements
strided                 views: which element of its source an element of a view is
evaluate                bounds of a node from those of the nodes that it is computed from
mask_form               branch and bound over the mask's boxes: all ones, causal, or neither
"""
