"""The gateway and its engines: K vLLM engines behind one OpenAI-compatible app."""
