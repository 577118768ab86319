"""The numbers kquant must reach, each measured and printed beside its bar: `python -m benchmarks --data FOLDER`."""
