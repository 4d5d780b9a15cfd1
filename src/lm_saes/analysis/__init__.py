"""What a latent stands for: the contexts in which it fires hardest."""
