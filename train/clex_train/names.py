"""Choices of the training's options, apart from the packages that they are carried out with."""

ATTENTIONS = ("sdpa", "eager")
POSITIONS = ("random", "uniform", "none", "chunked")
