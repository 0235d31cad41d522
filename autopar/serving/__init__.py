"""Inference. In: a traced model and a layout. Out: the price of a prefill, or of a token of a decode, and the batch that fits."""
