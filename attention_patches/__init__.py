"""Methods that steer attention: one controller per file, and `host.py`, which installs them on a MODEL."""
