"""Pure decisions: what a step's outcome means for its run. No I/O, no clock, no randomness anywhere in this package."""
