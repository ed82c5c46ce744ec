"""What a model costs before it exists: parameters, arithmetic, memory, time, money; to train it and to serve it.

Everything follows from the configuration by closed formulas (no torch): ``flops`` counts arithmetic, ``memory`` what a
device holds in a training step (``activations``: of a block), ``training`` turns both into time, ``search`` tries
layouts, ``serving`` is about generating text, and ``reported`` holds what was reported of GPT-4 beside what its shape
implies. Bytes are SI (1 GB is 10⁹), a GPU's FLOP/s are those of dense bfloat16 products.
"""
