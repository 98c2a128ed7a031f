"""The gradients of many samples or candidates at once: one engine for every attack that wants them."""
