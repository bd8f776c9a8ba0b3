"""The cluster planner: what a run will take, from the configuration and a description of the hardware."""
