"""The certificate authority, registry and change feed."""
