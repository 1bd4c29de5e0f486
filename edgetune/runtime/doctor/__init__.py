"""Is this device able to run a bundle: facts, the rules that judge them, and a trial run."""
