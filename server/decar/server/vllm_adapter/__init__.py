"""The only place that knows vLLM's private classes, on the engines' side and on the gateway's."""
