"""The bench: ours, every installed peer and the dense bound, side by side in one run (``python -m moe bench``).

A *contestant* is one implementation with its options; a *cell* is one thing that all of them do (a shape, a precision,
a load or a batch). Every contestant has a process of its own. In each cell all of them are prepared and checked against
float32 first; then they take turns, round after round, so that what a machine does in the meantime falls on all alike.
"""
