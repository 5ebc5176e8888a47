"""`decar-train`: from raw text to an ensemble directory. Knows nothing about how ensembles are served."""
