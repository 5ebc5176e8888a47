"""The gateway's process: requests, weights, leaders, slots, HTTP. Knows vLLM's public types only."""
