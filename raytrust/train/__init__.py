"""Training as a generator of records: the loop, private batches, DP-SGD."""
