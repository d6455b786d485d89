"""Which router is best at what: `python -m benchmarks.routers {regressors,gradients,language}`."""
