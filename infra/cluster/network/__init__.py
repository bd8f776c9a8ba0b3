"""What crosses the network, what it is built of, and what is left when a part fails."""
