"""Wiring of the verbs onto Ray. The only floor that imports it."""

import os

# We connect where a run begins. Left to itself, Ray would also start whenever it is asked for
# something: after Ctrl-C, by a thread that had not heard of it.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
