"""Look before you train: what the activations at a hook point are like, and which settings follow from that."""
