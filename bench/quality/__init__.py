"""What rounding does to a real model's answers: log-probabilities and greedy tokens beside those in float32."""
