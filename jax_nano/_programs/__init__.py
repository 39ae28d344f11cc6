"""Programs as they are: the switch, the hook in XLA's compiler, and what it makes of the products of an HLO module."""
