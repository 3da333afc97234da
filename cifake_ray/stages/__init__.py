"""Run the verbs on Ray. Only this folder imports Ray."""

import os

# We connect where a run begins. By default Ray would also start whenever it is used, such as by a
# thread that still runs after Ctrl-C.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
