"""The gate: before an external side effect its intent is recorded and granted to one sender."""
