"""One mesh endpoint: a host agent or a sidecar."""
