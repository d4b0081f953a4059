"""The paper in a box: offline scenes, questions, scorers, and the recipe and weights of the mini model."""
