"""Floor 1: the hospital's files as images with geometry. NumPy and SciPy, never torch."""
