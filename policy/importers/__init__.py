"""Importers: foreign firewall formats to Retinue policy, keeping the source truth table."""
