"""The ledger: what happened, what is uncertain, and what an operator may do about it."""
