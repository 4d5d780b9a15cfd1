"""Where batches come from: documents, rows of tokens, captured activations, mixed and shuffled. `factory.py` tells the whole way."""
