"""Language models: text to tokens, and tokens to the activations inside. Knows nothing of dictionaries."""
