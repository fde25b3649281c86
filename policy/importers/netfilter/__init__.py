"""Host packet filters of Linux: `iptables-save` and `nft -j list ruleset`."""
