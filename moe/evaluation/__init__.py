"""How good is a model? Its predictions of held-out text with their intervals, and lm-evaluation-harness on a run."""
