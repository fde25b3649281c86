"""Deterministic simulation: the real control plane and the real agents' state machines on virtual time (`make sim`)."""
