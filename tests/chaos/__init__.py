"""The chaos lab: real processes in namespaces, broken on purpose, with probes that count honestly (`make chaos`)."""
