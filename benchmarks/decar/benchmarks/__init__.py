"""What serving an ensemble costs. Starts servers as a user would, and knows none of their insides."""
