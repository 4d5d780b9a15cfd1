"""Evaluation: one function per metric, the evaluator that gathers them over a stream, and the PCA baseline."""
