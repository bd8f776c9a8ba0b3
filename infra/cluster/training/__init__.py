"""Training on a cluster: layouts, memory, the time of a step, the search for the best."""
