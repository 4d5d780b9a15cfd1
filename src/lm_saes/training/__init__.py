"""Training a dictionary on a stream of activations."""
