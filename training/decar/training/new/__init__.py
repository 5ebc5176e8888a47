"""`decar new`: an ensemble directory from checkpoints that exist. Knows files and models, never how they are served."""
