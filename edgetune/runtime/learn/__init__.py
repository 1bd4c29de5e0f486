"""Learning on the device: tier 0 in numpy, tiers 1 and 2 as a training graph."""
