"""From a picture to a trajectory: the value, the step rules, and `host.py`, which runs them on a MODEL."""
