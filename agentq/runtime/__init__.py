"""claim -> perform -> advance -> commit -> publish: the durability protocol at work, over any store and any broker."""
