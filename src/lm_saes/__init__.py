"""lm_saes: sparse autoencoders and transcoders for language models."""
