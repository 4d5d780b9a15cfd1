"""Ground truth: activations that are made of known features, and how well a dictionary finds them (SynthSAEBench, arXiv 2602.14687)."""
