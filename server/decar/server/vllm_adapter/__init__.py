"""The only place that knows vLLM's private classes: `seams` lists them, `versions` knows what has moved."""
