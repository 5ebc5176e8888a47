"""What both kinds of process use: the plane, requests' parts in the lockstep, its steps. Knows no vLLM."""
