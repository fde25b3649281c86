"""Pure core: names, keys, certificates, signed records, wire schemas and the error tree."""
