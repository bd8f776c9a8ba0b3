"""Serving: what a cluster's inference of a model is bound by, where experts go, what requests wait for."""
