"""Studies: sweeps of many training runs, as processes that can be stopped, retried and shared between machines."""
