"""Inference. In: a traced model and a layout. Out: the price of a prefill, or of a decode step and the batch that fits."""
